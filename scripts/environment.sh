# Sourced by the other scripts, in the repository's root: the virtual environment in .venv.
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V); set PYTHON to another" >&2
  exit 2
fi
[ -d .venv ] || "$PYTHON" -m venv .venv
source .venv/bin/activate

install() { # the repository itself, editable, with what is named behind it
  echo "Installing $1 into .venv (about a gigabyte the first time)"
  python -m pip install --quiet --disable-pip-version-check --editable "$1"
}
