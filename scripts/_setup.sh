# Prepare .venv for the scripts beside this file; source it, then run "$PYTHON".
#
# A fresh machine has Python 3.10 or newer with venv and pip, nothing else. What is installed is
# named in setup.cfg (what) and constraints.txt (which version). Where a Python with torch is found
# or the machine has an NVIDIA GPU, that torch or a CUDA build is used; elsewhere the CPU build.
#
# A stamp in .venv names the files and the Python it was made from: while it holds, set-up is one
# comparison. It is removed before the first change and written after the last one, so that an
# interrupted set-up is taken up again, and a lock lets two scripts start at once.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON="$PWD/.venv/bin/python"
SETUP_STAMP=.venv/setup-stamp
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

setup_fail() {
    echo "set-up: $*" >&2
    exit 1
}

# What the environment depends on, as one line; fails where there is no working environment.
setup_state() {
    local version
    version=$("$PYTHON" --version 2>/dev/null) || return 1
    echo "$version $PWD $(cat setup.cfg setup.py constraints.txt scripts/_setup.sh | cksum)"
}

setup_is_current() {
    local state
    state=$(setup_state) && [ -f "$SETUP_STAMP" ] && [ "$state" = "$(cat "$SETUP_STAMP")" ]
}

# Prints the folder that holds a usable torch of the given Python; fails where there is none.
torch_folder_of() {
    "$1" - 2>/dev/null <<'PY'
from importlib.metadata import distribution

torch = distribution("torch")
if tuple(int(part) for part in torch.version.split(".")[:2]) < (2, 11):
    raise SystemExit(1)
print(torch.locate_file(""))
PY
}

# Prints the first Python that can make an environment, but one that has torch before all others.
find_python() {
    local candidate first=""
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null || continue
        if torch_folder_of "$candidate" >/dev/null; then
            command -v "$candidate"
            return
        fi
        first=${first:-$(command -v "$candidate")}
    done
    [ -n "$first" ] && echo "$first"
}

setup_install() {
    local base=$1 torch_folder constraints=constraints.txt
    rm -f "$SETUP_STAMP"
    echo "set-up: .venv from $("$base" --version) ($base)"
    "$base" -m venv --clear .venv || setup_fail "could not make .venv with $base"

    if torch_folder=$(torch_folder_of "$base"); then
        # One line in a .pth file serves a Python of the system and one of another environment
        # alike; --system-site-packages would skip the latter.
        echo "set-up: using the torch in $torch_folder"
        echo "import site; site.addsitedir('$torch_folder')" \
            >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
        constraints=.venv/constraints.txt
        grep -v '^torch==' constraints.txt >"$constraints"
    elif ! { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }; then
        install_torch_cpu
    fi
    echo "set-up: installing the development packages"
    "$PYTHON" -m pip install -qq --disable-pip-version-check \
        --constraint "$constraints" --editable '.[dev]' || setup_fail "pip failed, see above"
    setup_state >"$SETUP_STAMP"
}

# Without this step pip takes PyPI's build, which is the same torch with gigabytes of CUDA. Where
# PyTorch's own index cannot be reached or has no such build, that one has to do.
install_torch_cpu() {
    local torch
    torch=$(grep '^torch==' constraints.txt)
    echo "set-up: installing $torch, CPU build"
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --retries 0 --timeout 10 \
        --index-url "$TORCH_CPU_INDEX" "$torch+cpu" 2>/dev/null ||
        echo "set-up: no CPU build from $TORCH_CPU_INDEX, leaving the choice to pip"
}

if ! setup_is_current; then
    setup_python=$(find_python) ||
        setup_fail "no Python 3.10 or newer with the modules venv and ensurepip was found" \
            "(tried python3, python3.13 to python3.10 and python)." \
            "On Debian and Ubuntu: apt-get install python3-venv"
    # Opened for reading and locked through Python: there is no flock command on macOS. The lock
    # belongs to the open file, so it outlives that Python and ends with this shell at the latest.
    exec 9<setup.cfg
    "$setup_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    setup_is_current || setup_install "$setup_python"
    exec 9<&-
fi
