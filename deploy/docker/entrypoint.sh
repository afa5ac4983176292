#!/bin/sh
# Entry point of Tandem's image. `start [OPTIONS]` runs a Ray node and the app in this container; the options are those of
# `tandem serve up`. Anything else is a command of `tandem`, such as `keys create first`, also beside a node that runs:
# docker compose exec tandem entrypoint.sh serve status
set -eu

fail() {
  echo "tandem: $1" >&2
  exit "${2:-1}"
}

# Passwords come as files, so that neither the image nor `docker inspect` shows them.
for name in TANDEM_DATABASE_URL TANDEM_API_KEY TANDEM_ADMIN_TOKEN; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  [ -r "$file" ] || fail "${name}_FILE is $file, which user $(id -u) cannot read. Mount the secret there, with mode 0444 or this owner." 2
  value=$(cat "$file")
  [ -n "$value" ] || fail "${name}_FILE is $file, which is empty." 2
  export "$name=$value"
done

runtime=${TANDEM_RUNTIME_DIR:-/tmp/tandem-$(id -u)}
join() {
  export RAY_ADDRESS=auto RAY_AUTH_MODE=token "RAY_TMPDIR=$runtime/ray"
}
if [ "${1:-start}" != start ]; then
  if [ -e "$runtime/node.json" ]; then join; fi
  exec tandem "$@"
fi
[ $# -eq 0 ] || shift

home=${TANDEM_HOME:-$HOME/.tandem}
for folder in "$home" "$HOME"; do
  { mkdir -p "$folder" && [ -w "$folder" ]; } 2>/dev/null ||
    fail "User $(id -u) cannot write $folder. Mount a volume there that belongs to this user (chown 10001:10001)." 2
done
case ${TANDEM_DATABASE_URL:-} in
  *'<'*) fail "TANDEM_DATABASE_URL still has a placeholder (<...>). Fill in its secret." 2 ;;
  '' | sqlite*) ;;
  *) tandem db upgrade ;;
esac
# Other machines reach the port, so the app starts only when it can tell who asks.
keys=$(tandem keys ls --json)
case $keys in
  *'"id"'*) ;;
  *) fail "There is no API key yet. Make one: docker compose run --rm tandem keys create first" 2 ;;
esac

# Half of /dev/shm for Ray's objects: NCCL and torch need the rest.
objects=$(df -Pk /dev/shm | awk 'NR == 2 { printf "%d", $2 * 512 }')
tandem node start --head --port=6379 --dashboard-host=127.0.0.1 --metrics-export-port=8080 "--object-store-memory=$objects"
join
exec tandem serve up --host 0.0.0.0 "$@"
