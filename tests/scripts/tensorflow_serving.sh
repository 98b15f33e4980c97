#!/bin/sh
# What a team that uses TensorFlow Serving has in its scripts: only the port is another one.
# Usage: tensorflow_serving.sh HOST:PORT MODEL IMAGE
set -eu
models="http://$1/v1/models"
model="$models/$2"

curl -sS -f "$model"
curl -sS -f "$model/versions/1"
curl -sS -f "$model/metadata"

# One request in the row format, one in the column format. curl -d says that they are forms; nobody minds.
image=$(base64 -w0 "$3")
curl -sS -f -d "{\"signature_name\": \"serving_default\", \"instances\": [{\"b64\": \"$image\"}]}" -X POST "$model:predict"
curl -sS -f -d "{\"instances\": [{\"image_bytes\": {\"b64\": \"$image\"}}]}" -X POST "$model/versions/1:predict"
curl -sS -f -d "{\"inputs\": {\"image_bytes\": [{\"b64\": \"$image\"}]}}" -X POST "$model:predict"

# What does not exist gives an HTTP error and a sentence.
curl -sS -w '%{http_code}\n' -d '{"instances": [1.0]}' -X POST "$models/nothing:predict"
