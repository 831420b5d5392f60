"""The `topo` command: a shell's way to what the packages below do.

console -> options -> saved, train, measured -> app. Commands parse, call and print; what they call is in topo_adapter
and topo_evaluation.
"""
