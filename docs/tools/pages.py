"""Writes one page of API reference for each folder of the package, from the folder's table of contents."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "cedarjax"
ENTRY = """
::: {path}
    options:
      heading: {name}
      toc_label: {name}
"""


def contents(folder: Path) -> dict[str, list[str]]:
    """Public names of a folder by the module that defines them, in the order of its `__init__.py`."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return found


def defining(module: str, name: str) -> str:
    """The module that defines `name`, where `module` may be a folder that passes it on."""
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    if folder.is_dir():
        return next(inner for inner, names in contents(folder).items() if name in names)
    return module


def page(path: str, rooms: dict[str, list[str]]) -> str:
    """Markdown of one page: the docstring of the folder, then each module with its public names."""
    text = [f"# {path}\n", f"::: {path}\n    options: {{show_root_heading: false, members: false}}\n"]
    for module, names in rooms.items():
        if not module.startswith(f"{path}."):  # described on the page of its own folder
            text.append(f"Also here, from [`{module}`][{module}]: {', '.join(f'`{name}`' for name in names)}.\n")
            continue
        text.append(f"## `{module.removeprefix('cedarjax.').replace('.', '/')}.py`\n")
        text.append(f"::: {module}\n    options: {{show_root_heading: false, members: false}}\n")
        text += [ENTRY.format(path=f"{module}.{name}", name=name) for name in names]
    return "\n".join(text)


def folders() -> dict[str, dict[str, list[str]]]:
    """Public names by module by folder; the folders in the order in which a reader meets them."""
    order = {"core": 0, "local": 1, "meta": 2, "personal": 3, "server": 4, "layers": 5, "robust": 6, "attacks": 7}
    found = {}
    for init in sorted(PACKAGE.glob("*/__init__.py"), key=lambda init: (order.get(init.parent.name, len(order)), init)):
        rooms: dict[str, list[str]] = {}
        for module, names in contents(init.parent).items():
            for name in names:
                rooms.setdefault(defining(module, name), []).append(name)
        found[init.parent.name] = rooms
    return found


def on_config(config):
    """Adds the pages to the navigation."""
    pages = [{name: f"api/{name}.md"} for name in folders()]
    config.nav = [*config.nav, {"API reference": pages}]
    return config


def on_files(files, config):
    """Adds the pages themselves."""
    from mkdocs.structure.files import File

    for name, rooms in folders().items():
        text = page(f"cedarjax.{name}", rooms)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files
