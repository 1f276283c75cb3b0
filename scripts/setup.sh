#!/usr/bin/env bash
# Makes the virtual environment with the package and one of its extras; a second run finds it done.
#   source scripts/setup.sh [EXTRA]   # and activates it (default extra: train)
# $PYTHON picks the interpreter, $SPECBOUND_VENV the folder (default: .venv in the repository root), and
# $SPECBOUND_CONSTRAINTS the file of versions (default: constraints.txt; /dev/null takes the newest there are).

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    # Sourced: the work runs in a process of its own, so that a failure never ends the caller's shell.
    bash "${BASH_SOURCE[0]}" "${1:-train}" || return 1
    # shellcheck disable=SC1091
    . "${SPECBOUND_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/activate"
    return
fi

set -euo pipefail
extra=${1:-train}
# A relative folder is seen from where the script was called, before the change of folder.
venv=${SPECBOUND_VENV:-}
case $venv in "" | /*) ;; *) venv=$PWD/$venv ;; esac
cd "$(dirname "$0")/.."
venv=${venv:-$PWD/.venv}
constraints=${SPECBOUND_CONSTRAINTS:-constraints.txt}
stamp=$venv/specbound-setup.txt

# pip reports Ctrl-C as an ordinary failure, after which the next attempt would start.
trap 'exit 130' INT TERM

die() {
    echo "setup: $*" >&2
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Modules are compiled at the end, on all cores.
pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check -qq install --no-compile "$@"
}

make_venv() {
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10) python="" candidate
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_supported "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || die "needs Python 3.10 to 3.13, and ${candidates[*]} is none; set PYTHON to one"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        die "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt install" \
            "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
}

# PyTorch's default Linux build carries gigabytes of CUDA, of no use where no GPU is seen.
install_torch() {
    if nvidia-smi >/dev/null 2>&1; then
        echo "setup: installing torch${torch:+ $torch}"
        pip_install "torch${torch:+==$torch}"
        return
    fi
    echo "setup: installing torch${torch:+ $torch} (CPU build where one is offered)"
    # The first two may fail unseen: pip may know a place with the CPU build, and the index may be out of reach.
    if [ -n "$torch" ]; then
        pip_install "torch==$torch+cpu" 2>/dev/null || cpu_index "torch==$torch+cpu" || pip_install "torch==$torch"
    else
        cpu_index torch || pip_install --no-index torch 2>/dev/null || pip_install torch
    fi
}

cpu_index() {
    pip_install --timeout 5 --retries 0 --index-url https://download.pytorch.org/whl/cpu "$1" 2>/dev/null
}

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>&1)" ]; then
    die "$venv exists and is no virtual environment; set SPECBOUND_VENV to another folder"
fi
# pip comes last into a virtual environment: without it, making one was cut short.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
fi
is_supported "$venv/bin/python" || die "$venv has another Python than 3.10 to 3.13; remove it and run again"

wanted="$(cat pyproject.toml "$constraints" | cksum) $PWD"
if grep -qxF "$wanted [$extra]" "$stamp" 2>/dev/null; then
    exit 0
fi
# What other extras installed under the same versions stays true; an interrupted run leaves no stamp.
done_before=$(grep -F "$wanted [" "$stamp" 2>/dev/null || true)
rm -f "$stamp"
torch=$(sed -n 's/^torch==//p' "$constraints")
has_torch='import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])'
"$venv/bin/python" -c "$has_torch" "$torch" 2>/dev/null || install_torch
echo "setup: installing specbound[$extra]"
pip_install -e ".[$extra]" -c "$constraints"
# Some environments never keep what an import compiles; a library's file for another Python does not compile, or need to.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
printf '%s\n' "${done_before:+$done_before$'\n'}$wanted [$extra]" >"$stamp"
