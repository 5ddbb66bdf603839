#!/bin/sh
# Installs the shelora client agent as a system service on Debian, Ubuntu or Raspberry Pi OS (64-bit). Run as root.
set -eu

PREFIX=/opt/shelora-agent
CONFIG=/etc/shelora-agent
STATE=/var/lib/shelora-agent
NAME=shelora-agent
UNIT=/etc/systemd/system/client-agent.service
PYTHON=${PYTHON:-python3.11}
CUDA=${CUDA:-}
NEEDED_MB=$([ -n "$CUDA" ] && echo 10000 || echo 3000)
HERE=$(cd "$(dirname "$0")" && pwd)
SOURCE=$(cd "$HERE/../.." && pwd)

usage() {
    cat <<USAGE
Usage: install.sh [--config FILE] [--token TOKEN --authority HOST:PORT] [--client NAME]
       install.sh --uninstall [--purge]

Makes the user $NAME, installs the agent into $PREFIX, its configuration into $CONFIG, and the service client-agent.
Running it again upgrades; configuration and state stay.

  --config FILE         configuration to install; without it the one that is there stays, or raspberry-pi.yaml is copied
  --token TOKEN         join token of the operator ('shelora token create'), good for one use; or set SHELORA_TOKEN
  --authority HOST:PORT enrolment address of the key authority
  --client NAME         name to take, if the token leaves it open
  --uninstall           remove service and program; configuration and state stay
  --purge               with --uninstall: remove those and the user as well

TORCH_INDEX=URL names a package index with builds of torch for CPUs; torch's own installation page names
one for the platform CPU. Elsewhere torch comes with CUDA, which adds gigabytes and is refused unless CUDA=1.
PYTHON=... names a Python 3.11. PIP_INDEX_URL and other PIP_ variables are obeyed; on a device without a network set
PIP_FIND_LINKS to a folder of wheels and PIP_NO_INDEX=1.
USAGE
}

die() { echo "install.sh: $*" >&2; exit 1; }
say() { echo "==> $*"; }

config='' authority='' client='' uninstall='' purge='' token=${SHELORA_TOKEN:-}
while [ $# -gt 0 ]; do
    case $1 in
        --config | --token | --authority | --client)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --config) config=$2 ;;
                --token) token=$2 ;;
                --authority) authority=$2 ;;
                --client) client=$2 ;;
            esac
            shift ;;
        --uninstall) uninstall=1 ;;
        --purge) purge=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown argument $1" ;;
    esac
    shift
done

[ "$(id -u)" = 0 ] || die "run it as root (sudo $0 ...)"

# Whether systemd runs this machine; in a container or an image that is being built it does not.
managed() { [ -d /run/systemd/system ]; }

remove() {
    if managed; then systemctl disable --now client-agent.service 2>/dev/null || true; fi
    rm -f "$UNIT"
    rm -rf "$PREFIX"
    if managed; then systemctl daemon-reload; fi
    if [ -n "$purge" ]; then
        rm -rf "$CONFIG" "$STATE"
        if id "$NAME" >/dev/null 2>&1; then userdel "$NAME"; fi
        say "removed, with configuration and state"
    else
        say "removed; $CONFIG and $STATE stay (--purge removes them)"
    fi
}

check_platform() {
    case $(uname -m) in
        x86_64 | aarch64) ;;
        *) die "$(uname -m) is not supported: 64-bit x86 or ARM is needed (on a Raspberry Pi: the 64-bit OS)" ;;
    esac
    command -v "$PYTHON" >/dev/null || die "$PYTHON is missing: apt-get install python3.11 python3.11-venv, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || die "$PYTHON is not Python 3.11; set PYTHON"
    "$PYTHON" -c 'import ensurepip' 2>/dev/null || die "venv is missing: apt-get install python3.11-venv"
    free_mb=$(($(df -Pk /opt | awk 'NR == 2 { print $4 }') / 1000))
    [ "$free_mb" -gt "$NEEDED_MB" ] || die "$NEEDED_MB MB must be free at /opt; $free_mb MB are"
}

make_user() {
    id "$NAME" >/dev/null 2>&1 && return
    say "making the user $NAME"
    useradd --system --user-group --home-dir "$STATE" --no-create-home --shell /usr/sbin/nologin "$NAME"
}

pip_install() {
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$SOURCE/requirements/constraints.txt" "$@" ||
        die "pip failed; the agent that was installed before, if any, is untouched"
}

# By itself, so that one sees what it would draw in before that is fetched. The service uses no GPU.
install_torch() {
    pip_install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
    [ -z "$CUDA" ] || return 0
    "$new/bin/python" -c '
import importlib.metadata as m, sys
sys.exit(any(name.startswith(("nvidia-", "cuda-")) for name in m.requires("torch") or ()))' ||
        die "this torch is built for CUDA and would fetch gigabytes that the service does not use: set TORCH_INDEX to an
index with torch for CPUs (see --help), or CUDA=1 to take it all the same"
}

install_program() {
    say "installing the program into $PREFIX (torch and others: some minutes)"
    new=$PREFIX/venv-$(date +%s)
    mkdir -p "$PREFIX"
    build=$(mktemp -d)
    trap 'rm -rf "$build" "$new"' EXIT
    (cd "$SOURCE" && cp -R pyproject.toml README.md LICENSE shelora coordinator client_agent services "$build")
    "$PYTHON" -m venv "$new"
    install_torch
    pip_install "$build[agent]"
    ln -sfn "$new" "$PREFIX/venv"
    trap 'rm -rf "$build"' EXIT
    cp "$HERE/README.md" "$PREFIX/README.md"
}

# After the service was restarted: until then it may still load parts of them.
remove_old_programs() {
    for old in "$PREFIX"/venv-*; do
        [ "$old" = "$new" ] || rm -rf "$old"
    done
}

install_configuration() {
    mkdir -p "$CONFIG" "$STATE"
    chown "$NAME:$NAME" "$STATE"
    chmod 0700 "$STATE"
    if [ -n "$config" ]; then
        cp "$config" "$CONFIG/agent.yaml"
    elif [ ! -e "$CONFIG/agent.yaml" ]; then
        cp "$HERE/raspberry-pi.yaml" "$CONFIG/agent.yaml"
        say "copied raspberry-pi.yaml to $CONFIG/agent.yaml: fill in what is marked"
    fi
    if [ ! -e "$CONFIG/environment" ]; then
        echo "# SHELORA_AGENT__LORA__RANK=8 sets lora.rank of agent.yaml." >"$CONFIG/environment"
    fi
    chown -R "root:$NAME" "$CONFIG"
    chmod 0750 "$CONFIG"
    chmod 0640 "$CONFIG/agent.yaml" "$CONFIG/environment"
}

as_agent() { runuser -u "$NAME" -- env -C "$STATE" HOME="$STATE" "$@"; }

enrol() {
    [ -n "$token" ] || return 0
    say "enrolling"
    SHELORA_TOKEN=$token as_agent "$PREFIX/venv/bin/client-agent" enroll \
        --authority "$authority" --state-dir "$STATE/state" ${client:+--client "$client"}
}

install_service() {
    install -m 0644 "$HERE/client-agent.service" "$UNIT"
    if ! managed; then
        say "systemd does not run here: the service is installed, not started"
        return
    fi
    systemctl daemon-reload
    systemctl enable client-agent.service
    if [ -e "$STATE/state/identity/identity.pem" ]; then
        systemctl restart client-agent.service
        say "running; follow it with: journalctl -u client-agent -f"
    else
        say "not enrolled yet; then: systemctl start client-agent"
    fi
}

if [ -n "$uninstall" ]; then
    remove
    exit 0
fi
if [ -n "$token" ] && [ -z "$authority" ]; then die "--token needs --authority"; fi
if [ -n "$config" ] && [ ! -r "$config" ]; then die "$config cannot be read"; fi
check_platform
make_user
install_program
install_configuration
enrol
install_service
remove_old_programs
say "check this device: runuser -u $NAME -- $PREFIX/venv/bin/client-agent doctor --config $CONFIG/agent.yaml"
