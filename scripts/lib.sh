# What the scripts share. Sourced, never run; the caller has set -euo pipefail.
# shellcheck shell=bash

# The repository's root.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# A service or a CI job may come without HOME.
if [ -z "${HOME:-}" ]; then
  HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
  export HOME
fi

# Everything that the scripts keep lies here: images, the build, tools. May be deleted at any time.
# (Not LAZYIMG_WORK_DIR: the variables named after flags belong to the lazyimg command.)
work=${LAZYIMG_DEV_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/lazyimg}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$work/target}

say() { printf '==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  shift
  for line in "$@"; do printf '    %s\n' "$line" >&2; done
  exit 1
}

# quiet LOG COMMAND...: runs the command with its output in LOG; shows the end of LOG when it fails.
quiet() {
  local log=$1 status=0
  shift
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  if [ "$status" -ne 0 ]; then
    printf '%s: error: failed (status %s): %s\n' "$(basename "$0")" "$status" "$*" >&2
    printf '    the last lines of %s:\n' "$log" >&2
    tail -n 40 "$log" | sed 's/^/    | /' >&2
  fi
  return "$status"
}

# as_root COMMAND...: runs the command as root, through sudo when needed.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo -- "$@"
  else
    die "this step needs root: $*" "run the script as root, or install sudo"
  fi
}

# apt_get WORDS...: apt-get as root, without questions.
apt_get() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@"
}

# Whether as_root would work.
may_be_root() {
  [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null
}

# The oldest Rust that will do.
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml")

# Prints the version of the cargo on the PATH; nothing when there is none that works.
cargo_version() {
  cargo --version 2>/dev/null | cut -d' ' -f2 || true
}

# Whether that cargo is new enough.
rust_fits() {
  local have
  have=$(cargo_version)
  [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$rust_wanted" "$have" | sort -V | head -n 1)" = "$rust_wanted" ]
}

# Whether rustup's stable toolchain is new enough; then it is used from here on, whatever the default is.
stable_fits() {
  if ! command -v rustup >/dev/null || ! rustup toolchain list 2>/dev/null | grep '^stable' >/dev/null; then return 1; fi
  RUSTUP_TOOLCHAIN=stable rust_fits || return 1
  export RUSTUP_TOOLCHAIN=stable
}

# Finds a cargo that is new enough: on the PATH, or where rustup puts it when PATH or HOME do not say so.
find_cargo() {
  local home dir path=$PATH
  home=$(getent passwd "$(id -u)" | cut -d: -f6)
  # rustup's shims look for the toolchain below HOME, which may be another one than at install time.
  if [ -z "${RUSTUP_HOME:-}" ] && [ ! -d "$HOME/.rustup" ] && [ -d "$home/.rustup" ]; then
    export RUSTUP_HOME=$home/.rustup
  fi
  if rust_fits || stable_fits; then return; fi
  for dir in "${CARGO_HOME:-$HOME/.cargo}/bin" "$home/.cargo/bin" /usr/local/cargo/bin; do
    [ -x "$dir/cargo" ] || continue
    PATH=$dir:$path
    if rust_fits || stable_fits; then return; fi
  done
  # A rustup whose toolchains are all too old can still get a new one: it stays on the PATH.
  command -v rustup >/dev/null || PATH=$path
  return 1
}

# Installs Rust with rustup: the one that is there, Debian's package (13 and later), or the official installer.
install_rust() {
  local log=$work/rust.log parts=(--profile minimal --component rustfmt --component clippy)
  mkdir -p "$work"
  : >"$log"
  if ! command -v rustup >/dev/null && command -v apt-get >/dev/null && may_be_root; then
    say "looking for Debian's rustup"
    apt_get update >>"$log" 2>&1 </dev/null || true
    if apt-cache show rustup 2>/dev/null | grep '^Package: rustup$' >/dev/null; then
      say "installing Debian's package rustup"
      # Not in place of a rustc and cargo that somebody has installed.
      quiet "$log" apt_get install --no-install-recommends --no-remove rustup || true
      hash -r
    fi
  fi
  if command -v rustup >/dev/null; then
    say "installing Rust's stable toolchain with rustup"
    quiet "$log" rustup toolchain install stable --no-self-update "${parts[@]}" || return 1
    # A default that somebody chose stays.
    [ -n "$(cargo_version)" ] || quiet "$log" rustup default stable
    return
  fi
  if ! command -v curl >/dev/null && may_be_root; then
    say "installing curl, to download Rust"
    quiet "$log" apt_get install --no-install-recommends curl ca-certificates || return 1
  fi
  say "installing Rust below ${CARGO_HOME:-$HOME/.cargo} with the installer from https://sh.rustup.rs"
  quiet "$log" curl --proto '=https' --tlsv1.2 --silent --show-error --fail --location --retry 3 \
    --output "$work/rustup-init.sh" https://sh.rustup.rs || return 1
  # A rustc of Debian's that is too old stays where it is.
  quiet "$log" env RUSTUP_INIT_SKIP_PATH_CHECK=yes sh "$work/rustup-init.sh" -y --no-modify-path \
    --default-toolchain stable "${parts[@]}" || return 1
  rm -f "$work/rustup-init.sh"
}

# Finds cargo, and installs Rust when there is none, or none new enough. Dies with advice when that fails.
need_cargo() {
  local have
  if find_cargo; then return; fi
  have=$(cargo_version)
  say "Rust $rust_wanted or newer is needed; found: ${have:-none}"
  if install_rust && find_cargo; then return; fi
  die "Rust $rust_wanted or newer is needed, and could not be installed; found: ${have:-none}" \
    "Is this machine offline? Install rustup as https://rustup.rs says, then:" \
    "  rustup toolchain install stable" \
    "and start this script again."
}

# need_component NAME COMMAND: a part of the Rust toolchain that minimal installations leave out.
need_component() {
  cargo "$2" --version >/dev/null 2>&1 && return
  if command -v rustup >/dev/null; then
    say "adding Rust's component $1"
    mkdir -p "$work"
    quiet "$work/rust.log" rustup component add "$1" || true
  fi
  cargo "$2" --version >/dev/null 2>&1 && return
  die "cargo $2 is missing" "rustup component add $1"
}

# .cargo/config.toml names Debian's RocksDB on x86-64; other architectures keep it elsewhere.
if [ "$(uname -m)" != x86_64 ] && command -v gcc >/dev/null; then
  ROCKSDB_LIB_DIR=${ROCKSDB_LIB_DIR:-/usr/lib/$(gcc -print-multiarch)}
  export ROCKSDB_LIB_DIR
fi

# Sets `port` to a loopback TCP port on which nobody listens.
free_port() {
  while :; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
  done
}

# start_registry DIR: serves a real registry from DIR on loopback; sets registry_pid and registry (host:port).
start_registry() {
  local dir=$1 tries log
  log=$dir/registry.log
  mkdir -p "$dir"
  for _ in 1 2 3 4 5; do
    free_port
    cat >"$dir/registry.yml" <<CONFIG
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $dir/blobs}
  delete: {enabled: true}
http: {addr: "127.0.0.1:$port"}
CONFIG
    docker-registry serve "$dir/registry.yml" >>"$log" 2>&1 </dev/null &
    registry_pid=$!
    for ((tries = 0; tries < 100; tries++)); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        # shellcheck disable=SC2034 # for the caller
        registry=127.0.0.1:$port
        return
      fi
      # Somebody took the port between the look and the bind: try another one.
      kill -0 "$registry_pid" 2>/dev/null || break
      sleep 0.1
    done
    stop_registry
  done
  tail -n 20 "$log" >&2
  die "docker-registry does not start; its log is $log"
}

# Ends the registry that start_registry started, and nothing else.
stop_registry() {
  if [ -n "${registry_pid:-}" ]; then
    kill "$registry_pid" 2>/dev/null || true
    wait "$registry_pid" 2>/dev/null || true
    registry_pid=
  fi
}
