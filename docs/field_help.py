"""For mkdocstrings: the help of a dataclass field, `field(metadata={"help": ...})`, is its docstring."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


def text_of(node: ast.expr, module: Any) -> str:
    """A string as it is written; what an f-string shows are constants of the module."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, module) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return str(module[ast.unparse(node.value)].value)
    return str(ast.literal_eval(node))


class FieldHelp(Extension):
    """Reads the sources; nothing is imported."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ast.expr]] = []

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        value = getattr(node, "value", None)
        if attr.docstring is not None or not isinstance(node, ast.AnnAssign) or not isinstance(value, ast.Call):
            return
        for keyword in value.keywords:
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, said in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "help":
                        self.found.append((attr, said))

    def on_package(self, **kwargs: Any) -> None:
        """A constant that a module imports is known once the whole package has been read."""
        for attr, said in self.found:
            attr.docstring = Docstring(text_of(said, attr.module), lineno=said.lineno, parent=attr)
        self.found.clear()
