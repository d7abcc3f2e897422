# Sourced by the other scripts, in the repository's root: the virtual environment in .venv.
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V); set PYTHON to another" >&2
  exit 2
fi
[ -d "$VENV" ] || "$PYTHON" -m venv "$VENV"
source "$VENV/bin/activate"

pip_install() {
  python -m pip install --quiet --disable-pip-version-check "$@"
}

install() { # the repository itself, editable, with what is named behind it
  echo "Installing $* into $VENV (1.5 GB on disk the first time)"
  pip_install --editable "$@"
}

# Tests compare with PyTorch. TORCH are pip's arguments, used where none is installed yet. The CPU build of
# the default, where pip is offered one, takes 0.75 GB; the usual one for Linux brings CUDA, several GB.
# Others: TORCH="torch --index-url URL", with the URL of the CPU builds on PyTorch's page of installation.
install_torch() {
  python -m pip show --quiet torch 2>/dev/null && return
  echo "Installing ${TORCH:=torch==2.13.*} into $VENV (0.75 GB on disk, several with CUDA)"
  pip_install $TORCH
}
