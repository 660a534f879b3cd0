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

# Finds cargo where rustup puts it when PATH or HOME do not say so. Dies with advice when there is none.
need_cargo() {
  local home
  home=$(getent passwd "$(id -u)" | cut -d: -f6)
  if ! command -v cargo >/dev/null; then
    for dir in "${CARGO_HOME:-$HOME/.cargo}/bin" "$home/.cargo/bin" /usr/local/cargo/bin; do
      if [ -x "$dir/cargo" ]; then
        PATH=$dir:$PATH
        break
      fi
    done
  fi
  # rustup's shims look for the toolchain below HOME, which may be another one than at install time.
  if [ -z "${RUSTUP_HOME:-}" ] && [ ! -d "$HOME/.rustup" ] && [ -d "$home/.rustup" ]; then
    export RUSTUP_HOME=$home/.rustup
  fi
  local wanted have
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
  have=$(cargo --version 2>/dev/null | cut -d' ' -f2) || true
  if [ -z "$have" ] || [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)" != "$wanted" ]; then
    die "Rust $wanted or newer is needed; found: ${have:-none}" \
      "Debian's rustc is too old. Install rustup as https://rustup.rs says, then:" \
      "  rustup toolchain install stable" \
      "and start this script again."
  fi
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
