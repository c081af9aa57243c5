#!/bin/sh
# Installs the packages of a lock file into .venv: `scripts/install.sh requirements.txt`.
#
# make calls this before each target that needs .venv, so it returns at once if there is nothing to
# do. PYTHON names the interpreter. Without it, an existing .venv keeps its interpreter, and a new
# .venv gets python3.
set -eu
lock=$1
python=${PYTHON:-python3}
# Contains the id of the installing process. If the file exists without that process, the process was
# killed, and .venv is created anew.
unfinished=.venv/unfinished

main() {
    # Process ids come again: in a container, the killed process may have had the id of this one.
    owner=$(cat "$unfinished" 2>/dev/null || true)
    if [ -n "$owner" ] && [ "$owner" != $$ ] && kill -0 "$owner" 2>/dev/null; then
        fail "Process $owner is installing into .venv: wait until it has finished." \
            "If it is another program: rm -r .venv"
    fi
    if usable && cmp -s "$lock" ".venv/$lock"; then
        return
    fi
    usable || create
    echo $$ >"$unfinished"
    echo "Installing the packages that $lock names ..."
    # The lock file names every package with its version and hashes, so pip resolves and compiles
    # nothing. That works with any pip, and a new release of a package changes nothing.
    .venv/bin/python -m pip --disable-pip-version-check install \
        --no-deps --require-hashes --only-binary :all: -r "$lock"
    # pip may have replaced packages of another lock file, which has changed since it was installed.
    # Without its copy here, it will be installed again.
    for stamp in .venv/requirements*.txt; do
        cmp -s "$stamp" "${stamp#.venv/}" || rm -f "$stamp"
    done
    cp "$lock" ".venv/$lock"
    rm "$unfinished"
    echo "Installed."
}

# Tests whether .venv is complete, and has the interpreter that PYTHON names.
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
