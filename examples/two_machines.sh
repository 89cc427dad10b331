#!/usr/bin/env bash
# One run by a server and a device that share nothing but a join line: split the model, serve, join, merge both halves
# into one model, stop the server.
#
#   examples/two_machines.sh                        both on this machine, over loopback and TLS; into runs/two-machines
#   examples/two_machines.sh --max-steps 5          settings of two_machines.yaml, by name
#
# On two machines each plays its part, with the same CONFIG:
#   PART=server LISTEN=0.0.0.0:7070 PUBLIC=server.example:7070 examples/two_machines.sh   prints the join line and serves
#   PART=device LINE='hosl://...' examples/two_machines.sh          once $WORK/halves/client was copied to the device
#
# CONFIG, WORK, MODEL, CUT, LABELS, SEED (of a new head, the config's) and HOSL (the command) can be set too.
set -euo pipefail
umask 077 # the join line is a secret
config=${CONFIG:-$(dirname "$0")/two_machines.yaml}
work=${WORK:-runs/two-machines}
hosl=${HOSL:-hosl}
server=

split_model() {
  "$hosl" split "${MODEL:-all-MiniLM-L6-v2}" "$work/halves" --cut "${CUT:-3}" \
    --head classification --labels "${LABELS:-20}" --seed "${SEED:-0}"
}

serve() { # becomes the server: its process id is that of the shell that calls this
  exec "$hosl" serve "$work/halves/server" --service "$work/service" --listen "${LISTEN:-127.0.0.1:0}" \
    --give-half ${PUBLIC:+--public "$PUBLIC"}
}

join() { # LINE
  "$hosl" join "$work/halves/client" --to "$1" --config "$config" --output-dir "$work/run" "${@:2}"
}

merge() { # LINE: fetches the server's half; $WORK/model loads in transformers
  "$hosl" merge "$work/run" --to "$1" --out "$work/model"
}

stop_server() {
  [ -z "$server" ] || { kill "$server" && wait "$server"; } || true
}

case ${PART:-both} in
  server)
    [ -e "$work/halves" ] || split_model
    serve
    ;;
  device)
    join "${LINE:?the join line that the server printed}" "$@"
    merge "$LINE"
    ;;
  both)
    [ ! -e "$work" ] || { echo "$work exists: set WORK to a new folder" >&2; exit 2; }
    mkdir -p "$work"
    split_model
    serve > "$work/server.out" 2> "$work/server.log" &
    server=$!
    trap stop_server EXIT
    until grep -q '^serving' "$work/server.out"; do
      kill -0 "$server" 2> /dev/null || { cat "$work/server.log" >&2; exit 1; }
      sleep 0.2
    done
    grep '^hosl://' "$work/server.out" > "$work/line"
    join "@$work/line" "$@"
    merge "@$work/line"
    ;;
  *)
    echo "PART is server or device, got ${PART}" >&2
    exit 2
    ;;
esac
