#!/usr/bin/env bash
# Sends a mail and a file through the service at $URL, by default http://localhost:$PORT, and shows
# how their tasks end. It also runs in bash 3.2, the version of macOS.
set -euo pipefail
URL=${URL:-http://localhost:${PORT:-8000}}
URL=${URL%/}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { python3 -m json.tool --no-ensure-ascii; }
location() { sed -n 's/^[Ll]ocation: *\([^[:space:]]*\).*/\1/p'; }

# Shows the task at the path $1 when it has ended, or after ten seconds.
outcome() {
  local origin task tries
  origin=$(echo "$URL" | sed 's|\(//[^/]*\).*|\1|')
  for tries in $(seq 50); do
    task=$(curl -fsS "$origin$1")
    case $task in
      *'"status":"succeeded"'* | *'"status":"failed"'*) break ;;
    esac
    sleep 0.2
  done
  echo "$task" | show
}

if ! curl -fsS -o /dev/null "$URL/livez"; then
  echo "Nothing answers at $URL. Start the service with: make run" >&2
  echo "If it listens at another port, name that: PORT=8001 make demo" >&2
  exit 1
fi
echo "This demo sends a mail and uploads a file to $URL, and shows how their tasks end."

say "A mail: the answer comes at once, and its Location header gives the address of the task"
answer=$(curl -fsSi -X POST "$URL/send-notification/ada@example.com?q=demo" \
  -H 'Content-Type: application/json' -d '{"subject": "Hello from the demo", "message": "It is done."}')
echo "$answer"

say "The task of the mail, when it has ended"
outcome "$(echo "$answer" | location)"

say "A file: its bytes are on disk before the answer"
answer=$(curl -fsSi -F "file=@README.md" "$URL/upload")
echo "$answer"

say "The task of the file, when it has ended"
outcome "$(echo "$answer" | location)"

say "An invalid address: the answer describes the problem, and no task is queued"
curl -sS -X POST "$URL/send-notification/nobody" | show

say "The mail is at $URL/inbox, or at http://localhost:8025 with Docker."
