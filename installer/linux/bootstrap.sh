#!/bin/sh
# Installs swarmkit for the person who calls it, on any Linux, without root. Run it again to upgrade.
#
#   ./bootstrap.sh                      install or upgrade, with the wheel that lies beside this script
#   ./bootstrap.sh --wheel FILE         the same with another wheel
#   ./bootstrap.sh --requirement TEXT   the same from the Python package index, such as 'swarmkit-llm[tray]'
#   ./bootstrap.sh --uninstall [--keep settings,identity,weights,history]
#
# Nothing starts by itself afterwards, and an upgrade does not change that.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
data=${XDG_DATA_HOME:-$HOME/.local/share}/swarmkit
applications=${XDG_DATA_HOME:-$HOME/.local/share}/applications
icons=${XDG_DATA_HOME:-$HOME/.local/share}/icons/hicolor
units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
launcher=$HOME/.local/bin/swarmkit
package=$data/package
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-https://pypi.org/simple}}
uv_script=https://astral.sh/uv/install.sh
need_kb=$((8 * 1024 * 1024))

say() { echo "swarmkit: $*"; }
fail() { say "$*" >&2; exit 1; }

check() {
    [ "$(uname -s)" = Linux ] || fail "this script is for Linux; installer/README.md names those for other systems"
    case "$(uname -m)" in
        x86_64 | aarch64) ;;
        *) fail "there are no packages of PyTorch and hivemind for $(uname -m)" ;;
    esac
    command -v flock >/dev/null 2>&1 || fail "flock is missing; install util-linux"
    if [ -e "$launcher" ] && ! head -c 200 "$launcher" | grep -q "swarmkit's launcher"; then
        fail "$launcher belongs to another installation of swarmkit; take that away first"
    fi
    mkdir -p "$data"
    free_kb=$(df -Pk "$data" | awk 'NR == 2 {print $4}')
    [ "$free_kb" -ge "$need_kb" ] || [ -e "$package/id" ] ||
        fail "PyTorch and what belongs to it need 8 GB in $data, and $((free_kb / 1024 / 1024)) GB are free"
}

# uv makes the environment, and finds or downloads a Python. It goes into swarmkit's own folder.
get_uv() {
    if command -v uv >/dev/null 2>&1 || [ -x "$data/uv/bin/uv" ]; then
        return
    elif python3 -c 'import ensurepip, venv' 2>/dev/null; then
        say "installing uv from the Python package index ($index) into $data/uv …"
        python3 -m venv "$data/uv" && "$data/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    else
        say "installing uv with its own installer ($uv_script) into $data/uv …"
        mkdir -p "$data/uv/bin"
        if command -v curl >/dev/null 2>&1; then curl -LsSf "$uv_script"; else wget -qO- "$uv_script"; fi |
            env UV_UNMANAGED_INSTALL="$data/uv/bin" sh
    fi || { rm -rf "$data/uv"; fail "uv could not be installed; https://docs.astral.sh/uv/ says how"; }
    [ -x "$data/uv/bin/uv" ] || fail "uv could not be installed; https://docs.astral.sh/uv/ says how"
}

# What the launcher installs: a wheel that is kept here, or a requirement for the index.
put_package() {
    mkdir -p "$package"
    rm -f "$package"/*.whl
    if [ -n "$requirement" ]; then
        echo "$requirement" >"$package/requirement"
        # From the index comes the version of the day; running this script again asks for a newer one.
        echo "index-$(date +%Y%m%d%H%M%S)" >"$package/id"
    else
        cp "$wheel" "$package/"
        file=$package/$(basename "$wheel")
        echo "swarmkit-llm[tray] @ file://$(echo "$file" | sed 's/%/%25/g; s/ /%20/g')" >"$package/requirement"
        sha256sum "$file" | cut -c1-16 >"$package/id"
    fi
}

# fill FILE TARGET: copies with the launcher's place filled in.
fill() {
    mkdir -p "$(dirname "$2")"
    sed "s|@LAUNCHER@|$launcher|g; s|@PACKAGE@|$package|g" "$here/$1" >"$2.new"
    mv "$2.new" "$2"
}

put_files() {
    fill launcher.sh "$launcher"
    chmod 755 "$launcher"
    fill org.swarmkit.tray.desktop "$applications/org.swarmkit.tray.desktop"
    fill swarmkit-worker.service "$units/swarmkit-worker.service"
    for icon in "$here"/icons/*.png; do
        [ -e "$icon" ] || continue
        side=$(basename "$icon" .png)
        mkdir -p "$icons/${side}x${side}/apps"
        cp "$icon" "$icons/${side}x${side}/apps/org.swarmkit.tray.png"
    done
}

uninstall() {
    if [ -x "$launcher" ] && head -c 200 "$launcher" | grep -q "swarmkit's launcher"; then
        "$launcher" uninstall --yes "$@"
    fi
    # Of an installation that never became complete, these are left.
    rm -rf "$package" "$data/envs" "$data/uv" "$data/python" "$applications/org.swarmkit.tray.desktop" \
        "$units/swarmkit-worker.service" "$icons"/*/apps/org.swarmkit.tray.png
    if head -c 200 "$launcher" 2>/dev/null | grep -q "swarmkit's launcher"; then rm -f "$launcher"; fi
    rmdir "$data" 2>/dev/null || true
}

requirement='' wheel=''
case "${1:-}" in
    --uninstall) shift; uninstall "$@"; exit 0 ;;
    --wheel) wheel=${2:?--wheel needs a file} ;;
    --requirement) requirement=${2:?--requirement needs a text} ;;
    '') for wheel in "$here"/swarmkit_llm-*.whl; do :; done ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
[ -n "$requirement" ] || [ -r "$wheel" ] || fail "there is no wheel beside this script; name one with --wheel"
check
get_uv
put_package
put_files
"$launcher" --prepare
say "installed; start it with $launcher tray, or from the desktop's menu"
case ":$PATH:" in
    *":$HOME/.local/bin:"*) ;;
    *) say "$HOME/.local/bin is not in your PATH: there, \`swarmkit\` alone is not found" ;;
esac
