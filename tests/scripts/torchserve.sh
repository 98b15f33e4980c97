#!/bin/sh
# What a team that uses TorchServe has in its scripts: only the port is another one.
# Usage: torchserve.sh HOST:PORT MODEL IMAGE
set -eu
server="http://$1"

curl -sS -f "$server/ping"
curl -sS -f "$server/predictions/$2" -T "$3"
curl -sS -f -X POST "$server/predictions/$2" -T "$3"
curl -sS -f "$server/predictions/$2" -F "data=@$3"
curl -sS -f "$server/predictions/$2/1" --data-binary "@$3"

curl -sS -w '%{http_code}\n' "$server/predictions/nothing" -T "$3"
curl -sS -w '%{http_code}\n' -X POST "$server/explanations/$2" -T "$3"
