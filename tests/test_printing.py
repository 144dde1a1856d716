"""process.py alone prints, and alone looks at the standard streams: every other module hands it text. (`exported` is other people's.)"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bam_merge"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "exported" not in path.relative_to(PACKAGE).parts]
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
PRINTERS = {
    "click": {
        "echo",
        "secho",
        "echo_via_pager",
        "progressbar",
        "prompt",
        "confirm",
        "pause",
        "clear",
        "get_text_stream",
        "get_binary_stream",
    },
    "sys": STREAMS,
    "rich": {"print", "inspect", "get_console"},
    "warnings": {"warn", "warn_explicit", "showwarning"},
    "traceback": {"print_exc", "print_exception", "print_stack", "print_tb", "print_last"},
    "pprint": {"pprint", "pp"},
    "logging": {"basicConfig", "StreamHandler", "getLogger", "lastResort"},
}


def printing(tree: ast.AST) -> Iterator[str]:
    """What in a module's source writes to a standard stream, or could."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id="print"):
                yield "print"
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in PRINTERS.get(module, ()):
                yield f"{module}.{name}"
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{alias.name}" for alias in names if alias.name in PRINTERS.get(module, ()))
            case ast.Call(func=ast.Name(id="Console" | "Progress" as name), keywords=keywords):  # rich's write to stdout unless told where
                if not {"file", "console"} & {keyword.arg for keyword in keywords}:
                    yield f"rich's {name}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="write" | "fdopen"), args=[ast.Constant(value=0 | 1 | 2), *_]):
                yield "os.write"
            case ast.Call(func=ast.Name(id="open"), args=[ast.Constant(value=1 | 2 | "/dev/stdout" | "/dev/stderr" | "/dev/tty"), *_]):
                yield "open"
            case ast.Call(func=ast.Attribute(attr="show"), args=[]):  # click's errors print themselves
                yield "show"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_module_prints(path: Path) -> None:
    found = set(printing(ast.parse(path.read_text())))
    if path == PACKAGE / "process.py":
        assert {"click.echo", "sys.stdout", "sys.stderr", "rich's Console", "show"} <= found
    else:
        assert not found


@pytest.mark.parametrize("line", [
    "print('x')", "out = print", "sys.stdout.write('x')", "x(file=sys.stderr)", "from sys import stdout", "click.echo('x')", "click.secho('x')",
    "from click import echo", "from rich import print", "Console().print('x')", "Console(stderr=True)", "Progress(disable=True)", "error.show()",
    "os.write(1, b'x')", "open(2, 'w')", "open('/dev/stdout', 'w')", "warnings.warn('x')", "traceback.print_exc()", "logging.getLogger()",
])  # fmt: skip
def test_what_prints_is_seen(line: str) -> None:
    assert list(printing(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["Console(file=StringIO()).print('x')", "Progress(console=console)", "print_result('x')", "os.write(file, b'x')"]
)
def test_what_does_not_print_is_not(line: str) -> None:
    assert not list(printing(ast.parse(line)))
