-- Posts the files named after `--`, in turns, each as one raw body, and ends with one line of JSON.

local requests, at = {}, 0

function init(arguments)
  wrk.headers["Content-Type"] = wrk.headers["Content-Type"] or "image/jpeg"
  -- Triton: the whole body is the one input. The others take no notice of it.
  wrk.headers["Inference-Header-Content-Length"] = wrk.headers["Inference-Header-Content-Length"] or "0"
  for _, path in ipairs(arguments) do
    local file = assert(io.open(path, "rb"))
    requests[#requests + 1] = wrk.format("POST", nil, nil, file:read("*all"))
    file:close()
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "microseconds": %d, "refused": %d, "broken": %d, "p50_us": %d, "p99_us": %d}\n',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
