#!/bin/sh
# Installs what a lock file names into .venv: `scripts/install.sh requirements.txt`.
#
# make calls this before each target that needs .venv, so it returns at once when nothing is to be
# done. PYTHON names the interpreter; without it, an existing .venv keeps its own, and a new one gets
# python3.
set -eu
lock=$1
python=${PYTHON:-python3}
# Holds the id of the process that installs. Where it is left over, that process was killed, and
# .venv is made anew.
unfinished=.venv/unfinished

main() {
    ! kill -0 "$(cat "$unfinished" 2>/dev/null)" 2>/dev/null ||
        fail "Process $(cat "$unfinished") is installing into .venv: wait until it has finished."
    if usable && cmp -s "$lock" ".venv/$lock"; then
        return
    fi
    usable || create
    echo $$ >"$unfinished"
    echo "Installing the packages that $lock names ..."
    # The lock names every package, its version and its hashes, so there is nothing to resolve and
    # nothing to compile: that works with any pip, and does not change with a new release of anything.
    .venv/bin/python -m pip --disable-pip-version-check install \
        --no-deps --require-hashes --only-binary :all: -r "$lock"
    cp "$lock" ".venv/$lock"
    rm "$unfinished"
    echo "Installed."
}

# Whether .venv is whole, and of the Python that was asked for.
usable() {
    [ ! -e "$unfinished" ] && [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null &&
        { [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version .venv/bin/python)" ]; }
}

version() {
    "$1" -c 'import sys; print(sys.version)' 2>/dev/null
}

create() {
    hint="Name another one: make PYTHON=/path/to/python3.13 run"
    command -v "$python" >/dev/null ||
        fail "Python 3.11 or newer is needed, and there is no $python here. $hint"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, and $python is $("$python" -V 2>&1). $hint"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module. On Debian and Ubuntu, this adds it:" \
            "apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    echo "Making .venv with $("$python" -V) ..."
    rm -rf .venv
    mkdir .venv
    echo $$ >"$unfinished"
    "$python" -m venv .venv
}

fail() {
    echo "$*" >&2
    exit 1
}

main
