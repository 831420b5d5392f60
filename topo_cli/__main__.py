"""`python -m topo_cli`, and so `accelerate launch -m topo_cli distill ...`."""

from .app import main

if __name__ == "__main__":
    main()
