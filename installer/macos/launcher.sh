#!/bin/sh
# swarmkit's launcher in the application bundle. Untested: it was written without a Mac.
# Makes the person's Python environment at the first start and after an upgrade, and runs swarmkit there. Without
# arguments, as Finder starts it, that is the tray.
set -eu

contents=$(cd "$(dirname "$0")/.." && pwd)
package=$contents/Resources
data=$HOME/Library/Application\ Support/swarmkit
id=$(cat "$package/id")
environment=$data/envs/$id
uv=$(command -v uv || echo "$data/uv/bin/uv")

show() { osascript -e "display notification \"$1\" with title \"swarmkit\"" >/dev/null 2>&1 || true; echo "swarmkit: $1" >&2; }

if [ ! -e "$environment/complete" ]; then
    show "Downloading what swarmkit needs, which takes minutes."
    mkdir -p "$data/envs"
    if [ ! -x "$uv" ]; then
        curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$data/uv/bin" sh
    fi
    rm -rf "$environment"
    export UV_PYTHON_INSTALL_DIR="$data/python"
    wheel=$(ls "$package"/swarmkit_llm-*.whl)
    if "$uv" venv --python '>=3.10' "$environment" &&
        "$uv" pip install --python "$environment/bin/python" "swarmkit-llm[tray] @ file://$(echo "$wheel" | sed 's/ /%20/g')"; then
        touch "$environment/complete"
        show "Ready."
    else
        rm -rf "$environment"
        show "The download failed. Start swarmkit again to go on."
        exit 1
    fi
fi
export SWARMKIT_LAUNCHER="$0"
[ $# -gt 0 ] || set -- tray
exec "$environment/bin/swarmkit" "$@"
