"""The exception tree is public: what a caller catches may not change unseen."""

import inspect

from anatomynet.engine import errors

TREE = {
    "StudyError": "AnatomyNetError",
    "GeometryError": "AnatomyNetError",
    "DataError": "AnatomyNetError",
    "ModelError": "AnatomyNetError",
    "ExportError": "AnatomyNetError",
    "ParityError": "ExportError",
    "ServerError": "AnatomyNetError",
    "ServerBusyError": "ServerError",
    "NodeError": "AnatomyNetError",
    "OutputError": "AnatomyNetError",
    "AnatomyNetError": "Exception",
}


def test_the_tree_is_this_one() -> None:
    found = {name: cls.__bases__ for name, cls in inspect.getmembers(errors, inspect.isclass)}
    assert {name: base.__name__ for name, (base,) in found.items()} == TREE


def test_the_modules_docstring_draws_it() -> None:
    assert errors.__doc__ is not None
    drawn = [line.strip("│├└─ ").split()[0] for line in errors.__doc__.splitlines() if "Error " in line]
    assert set(TREE) <= set(drawn)
