#!/bin/sh
# swarmkit's launcher: makes the Python environment of the person who calls it, at the first start and after an
# upgrade, and runs swarmkit there. Nothing is changed outside of the person's own folders.
set -eu

launcher=@LAUNCHER@
package=${SWARMKIT_PACKAGE:-@PACKAGE@} # has `id`, `requirement` and the wheel
data=${XDG_DATA_HOME:-$HOME/.local/share}/swarmkit
environments=$data/envs
log=$data/envs/prepare.log

say() { echo "swarmkit: $*" >&2; }

# The uv that this person has, or the one that the bootstrap script has installed here.
run_uv() {
    if command -v uv >/dev/null 2>&1; then
        uv "$@"
    else
        UV_CACHE_DIR=${UV_CACHE_DIR:-$data/uv/cache} "$data/uv/bin/uv" "$@"
    fi
}

has_uv() {
    [ -z "${SWARMKIT_NO_UV:-}" ] && { command -v uv >/dev/null 2>&1 || [ -x "$data/uv/bin/uv" ]; }
}

# Fill the new environment. uv and pip show what they download.
install() {
    requirement=$(cat "$package/requirement")
    if has_uv; then
        export UV_PYTHON_INSTALL_DIR="$data/python"
        run_uv venv --quiet --python '>=3.10' "$environment" &&
            run_uv pip install --python "$environment/bin/python" "$requirement"
    else
        python3 -m venv "$environment" &&
            "$environment/bin/python" -m pip install --disable-pip-version-check "$requirement"
    fi || return 1
    rm -rf "$data/uv/cache"
    touch "$environment/complete"
}

# Show the progress to a person who has clicked on the icon, and sees no terminal.
install_with_window() {
    failed=$environments/.failed
    rm -f "$failed"
    if [ -t 2 ] || [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
        install || touch "$failed"
    elif command -v zenity >/dev/null 2>&1; then
        { install 2>&1 || touch "$failed"; } | tee "$log" | sed -u 's/^/# /' |
            zenity --progress --pulsate --auto-close --no-cancel --width=500 --title=swarmkit \
                --text='Downloading what swarmkit needs …' || true
    else
        command -v notify-send >/dev/null 2>&1 &&
            notify-send swarmkit "Downloading what swarmkit needs, which takes minutes. $log shows how far it is."
        install >"$log" 2>&1 || touch "$failed"
    fi
    [ ! -e "$failed" ] && [ -e "$environment/complete" ]
}

# Environments of former versions go at the next start after the last process that uses them has ended.
prune() {
    for old in "$environments"/*/; do
        old=${old%/}
        [ -d "$old" ] && [ "$old" != "$environment" ] || continue
        grep -qsaF "$old/" /proc/[0-9]*/cmdline || rm -rf "$old"
    done
}

# Keep other starts of this person out while environments come and go.
locked() {
    exec 9>"$environments/.lock"
    flock 9
    "$@"
    exec 9>&-
}

newest_complete() {
    for old in $(ls -1t "$environments" 2>/dev/null); do
        [ -e "$environments/$old/complete" ] && echo "$environments/$old" && return
    done
    return 0
}

prepare() {
    if [ ! -e "$environment/complete" ]; then
        say "making your Python environment in $environment (several gigabytes are downloaded) …"
        rm -rf "$environment"
        if ! install_with_window; then
            rm -rf "$environment" "$environments/.failed"
            environment=$(newest_complete)
            if [ -z "$environment" ]; then
                say "the environment could not be made; look at the messages above or at $log, and start again"
                exit 1
            fi
            say "the new version could not be installed; the former one goes on"
        fi
    fi
    prune
}

[ -r "$package/id" ] || { say "$package is not there; install swarmkit again"; exit 1; }
environment=$environments/$(cat "$package/id")
if [ "${1:-}" = uninstall ] && [ ! -e "$environment/complete" ]; then
    # It is not worth gigabytes to take something away.
    environment=$(newest_complete)
    if [ -z "$environment" ]; then
        say "no environment was made for you; what there may be is in ~/.config/swarmkit, ~/.local/state/swarmkit," \
            "~/.cache/swarmkit and $data"
        exit 0
    fi
elif [ ! -e "$environment/complete" ]; then
    mkdir -p "$environments"
    locked prepare
elif [ "$(echo "$environments"/*/)" != "$environment/" ]; then
    locked prune
fi
[ "${1:-}" != --prepare ] || exit 0
export SWARMKIT_LAUNCHER="$launcher"
exec "$environment/bin/swarmkit" "$@"
