#!/usr/bin/env bash
# Sends a mail and a file through the service at $URL, and shows what became of them.
set -euo pipefail
URL=${URL:-http://localhost:8000}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { python3 -m json.tool --no-ensure-ascii; }
location() { sed -n 's/^[Ll]ocation: *\([^[:space:]]*\).*/\1/p'; }

curl -fsS -o /dev/null "$URL/livez" || { echo "Nothing answers at $URL: start it with make run or make up." >&2; exit 1; }

say "A mail: the answer comes at once, and says where to ask"
answer=$(curl -fsSi -X POST "$URL/send-notification/ada@example.com?q=demo" \
  -H 'Content-Type: application/json' -d '{"subject": "Hello from the demo", "message": "It is done."}')
echo "$answer"
task=$(echo "$answer" | location)

say "A moment later"
sleep 1
curl -fsS "$URL$task" | show

say "A file: its bytes are on disk before the answer"
answer=$(curl -fsSi -F "file=@README.md" "$URL/upload")
echo "$answer"
task=$(echo "$answer" | location)

say "A moment later"
sleep 1
curl -fsS "$URL$task" | show

say "An address that is none: a problem, and nothing is queued"
curl -sS -X POST "$URL/send-notification/nobody" | show

say "The mail is at $URL/inbox, or at http://localhost:8025 with Docker."
