#!/usr/bin/env bash
# Sends a mail and a file through the service at $URL, by default http://localhost:$PORT, and shows
# what became of them. It runs in bash 3.2 as well, which macOS has.
set -euo pipefail
URL=${URL:-http://localhost:${PORT:-8000}}
URL=${URL%/}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { python3 -m json.tool --no-ensure-ascii; }
location() { sed -n 's/^[Ll]ocation: *\([^[:space:]]*\).*/\1/p'; }

# Shows the task at the path $1 once it has ended, or as it is after ten seconds.
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
echo "This demo sends one mail and uploads one file to $URL, and asks what became of both."

say "A mail: the answer comes at once, and its Location says where to ask"
answer=$(curl -fsSi -X POST "$URL/send-notification/ada@example.com?q=demo" \
  -H 'Content-Type: application/json' -d '{"subject": "Hello from the demo", "message": "It is done."}')
echo "$answer"

say "What became of the mail"
outcome "$(echo "$answer" | location)"

say "A file: its bytes are on disk before the answer"
answer=$(curl -fsSi -F "file=@README.md" "$URL/upload")
echo "$answer"

say "What became of the file"
outcome "$(echo "$answer" | location)"

say "An address that is not one: the answer is a problem, and nothing is queued"
curl -sS -X POST "$URL/send-notification/nobody" | show

say "The mail is at $URL/inbox, or at http://localhost:8025 with Docker."
