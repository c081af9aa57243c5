#!/bin/sh
# Installs the packages of a lock file into .venv: `scripts/install.sh requirements.txt`.
#
# make calls this before each target that needs .venv, so it returns at once if there is nothing to
# do. PYTHON names the interpreter. Without it, an existing .venv keeps its interpreter, and a new
# .venv gets python3.
set -eu
lock=$1
python=${PYTHON:-python3}
# Exists while packages are installed. If it is there without an installation, that one was killed,
# and .venv is created anew.
unfinished=.venv/unfinished

main() {
    if up_to_date; then
        return
    fi
    usable || check_python
    wait_for_others
    if up_to_date; then
        return
    fi
    usable || create
    touch "$unfinished"
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

up_to_date() {
    usable && cmp -s "$lock" ".venv/$lock"
}

# Waits until no other process installs into .venv. The lock of this directory belongs to descriptor
# 9, which pip inherits. So it ends with the last of these processes, however they end.
wait_for_others() {
    exec 9<.
    if usable; then with=.venv/bin/python; else with=$python; fi
    "$with" -c 'if True:
        import fcntl
        try:
            fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another installation into .venv ...", flush=True)
            fcntl.flock(9, fcntl.LOCK_EX)
        except OSError:
            pass  # this file system has no locks
    '
}

# Tests whether .venv is complete, and has the interpreter that PYTHON names.
usable() {
    [ ! -e "$unfinished" ] && [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null &&
        { [ -z "${PYTHON:-}" ] || [ "$(version "$python")" = "$(version .venv/bin/python)" ]; }
}

version() {
    "$1" -c 'import sys; print(sys.version)' 2>/dev/null
}

check_python() {
    hint="Name another one: make PYTHON=/path/to/python3.13 run"
    command -v "$python" >/dev/null ||
        fail "Python 3.11 or newer is needed, and there is no $python here. $hint"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, and $python is $("$python" -V 2>&1). $hint"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module. On Debian and Ubuntu, this adds it:" \
            "apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
}

create() {
    check_python
    echo "Making .venv with $("$python" -V) ..."
    rm -rf .venv
    mkdir .venv
    touch "$unfinished"
    "$python" -m venv .venv
}

fail() {
    echo "$*" >&2
    exit 1
}

main
