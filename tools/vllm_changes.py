"""List what changed between two versions of vLLM at the places that this project relies on.

    python tools/vllm_changes.py OLD NEW

OLD and NEW are folders that hold ``vllm/``: unpacked wheels, or site-packages. The places are what `vllm_aasd/engine`
imports from vLLM, and what it replaces. Of classes the changed methods are named; comments, docstrings and layout don't
count. What is printed is what to read: a signature can stay and its meaning change.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Print a line for each place that isn't the same."""
    if len(sys.argv) != 3 or not all(Path(folder, "vllm").is_dir() for folder in sys.argv[1:]):
        sys.exit("usage: python tools/vllm_changes.py OLD NEW, folders that hold vllm/")
    lines = list(changes(*map(Path, sys.argv[1:])))
    print("\n".join(lines) or "nothing changed")


def places() -> set[tuple[str, str]]:
    """Module and name of all that the engine imports from vLLM or replaces there; of a method, those of its class."""
    found = set()
    for file in (ROOT / "vllm_aasd/engine").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    sys.path.insert(0, str(ROOT))
    from vllm_aasd.engine import patching

    targets = [target for of in patching.TARGETS.values() for target in of if target.module.startswith("vllm.")]
    return found | {(target.module, target.attribute.split(".")[0]) for target in targets}


def changes(old: Path, new: Path) -> Iterator[str]:
    """A line for each place that is not the same in both folders."""
    for module, name in sorted(places()):
        before, after = parts(old, module, name), parts(new, module, name)
        where = f"{module}.{name}"
        if after is None:
            yield f"gone     {where}"
        elif before is None:
            yield f"new      {where}"
        elif before != after:
            names = sorted(
                part for part in before.keys() | after.keys() if part and before.get(part) != after.get(part)
            )
            yield f"changed  {where}{': ' if names else ''}{', '.join(names)}"


def parts(folder: Path, module: str, name: str) -> dict[str, str] | None:
    """The code of a name by its parts, "" for what is in none: the methods of a class, a whole module; None if it isn't
    there."""
    base = folder / module.replace(".", "/")
    file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
    if not file.exists():
        return None
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            rest = ast.Module([one for one in node.body if one not in methods], [])
            return {one.name: code(one) for one in methods} | {"": code(rest)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return {"": code(node)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in {target.id for target in targets if isinstance(target, ast.Name)}:
                return {"": code(node)}
    for node in ast.walk(tree):
        # What a package hands on.
        if isinstance(node, ast.ImportFrom):
            origins = [alias.name for alias in node.names if name in (alias.asname, alias.name)]
            origins += [name for alias in node.names if alias.name == "*"]
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            parent = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parent, *filter(None, [node.module])])
            found = next(filter(None, (parts(folder, source, origin) for origin in origins)), None)
            if found is not None:
                return found
    return _module(folder, f"{module}.{name}")


def _module(folder: Path, module: str) -> dict[str, str] | None:
    base = folder / module.replace(".", "/")
    found = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()]
    return {"": code(ast.parse(found[0].read_text()))} if found else None


def code(node: ast.AST) -> str:
    """The text of a node without docstrings."""
    for one in ast.walk(node):
        body = getattr(one, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            one.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(node)


if __name__ == "__main__":
    main()
