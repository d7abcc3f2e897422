# Sourced by the other scripts in the repository root: creates and activates .venv.
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: needs Python 3.11 or newer, but $PYTHON is $("$PYTHON" -V); set PYTHON to a newer one" >&2
  exit 2
fi
[ -d "$VENV" ] || "$PYTHON" -m venv "$VENV"
source "$VENV/bin/activate"
# Many containers set it. Every child process of the tests would compile what it imports anew.
unset PYTHONDONTWRITEBYTECODE

pip_install() { # Python compiles what it imports; pip would take a minute more to compile everything
  python -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

install() { # arguments: the repository with its extras (installed editable), then other packages
  # pip takes 15 seconds to see that nothing is missing; any extra brings the package itself
  local record="$VENV/installed" wanted
  wanted="$(cat setup.py easyaira/__init__.py | cksum) $*"
  grep -qxF "$wanted" "$record" 2>/dev/null && return
  echo "Installing $* into $VENV (1.5 GB on disk the first time)"
  pip_install --editable "$@"
  printf '%s\n' "$wanted" "${wanted%% .*} ." >>"$record"
}

# Tests compare with PyTorch. If it is not installed, pip gets the arguments in TORCH. The default takes
# 0.75 GB as a CPU build; PyPI's build for Linux includes CUDA and takes several GB. For a CPU build, set
# TORCH="torch --index-url URL" with the URL from PyTorch's installation page.
install_torch() {
  python -m pip show --quiet torch 2>/dev/null && return
  echo "Installing ${TORCH:=torch==2.13.*} into $VENV (0.75 GB on disk, several with CUDA)"
  pip_install $TORCH
}
