"""Build the wheel and the source package, install each in a clean virtual environment, and run the demo there: `make dist`.

Both environments are made outside the repository, and what is installed is imported from there: a file that a package forgot is missed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run `command`; returns its stdout. Where it fails, this program ends with what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"check_dist.py: failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(package: Path, work: Path) -> None:
    """Install `package` in a virtual environment in `work`, and have it merge, verify and inspect."""
    work.mkdir()
    call(sys.executable, "-m", "venv", "venv", cwd=work)
    python = work / "venv" / "bin" / "python"
    for wanted in ("torch", str(package)):  # torch first and alone, as the Makefile does
        call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wanted, cwd=work)
    where = Path(call(python, "-c", "import bam_merge; print(bam_merge.__file__)", cwd=work).strip())
    if ROOT in where.parents or work not in where.parents:
        sys.exit(f"check_dist.py: {package.name}: imported from {where}, not from the virtual environment")
    call(work / "venv" / "bin" / "bam-merge", "demo", "demo", cwd=work)
    merged = call(work / "venv" / "bin" / "bam-merge", "inspect", "demo/bam", cwd=work)
    if "bam" not in merged:
        sys.exit(f"check_dist.py: {package.name}: bam-merge inspect demo/bam printed\n{merged}")
    print(f"{package.name}: installed and run", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, "-m", "build", "--outdir", ROOT / "dist")
        version = call(sys.executable, "-c", "import bam_merge; print(bam_merge.__version__)").strip()
        packages = [ROOT / "dist" / f"bam_merge-{version}-py3-none-any.whl", ROOT / "dist" / f"bam_merge-{version}.tar.gz"]
        for number, package in enumerate(packages):
            check(package, Path(folder).resolve() / str(number))


if __name__ == "__main__":
    main()
