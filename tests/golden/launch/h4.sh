#!/usr/bin/env bash
# h4: configs/imagenet.py:halonet_h4 on v5e:8x8, 16 host(s). bash h4.sh, from the repository, where gcloud is logged in.
# Makes the slice where there is none, starts the run on all hosts, and again after a preemption or
# a failure that a restart may cure. Started once more, it finds the run that goes on and shows it.
# Ctrl-C lets the run save and end. The slice stays, and costs, until it is deleted.
set -uo pipefail

name=h4
tpu() { gcloud compute tpus tpu-vm "$@" --project=p --zone=us-west4-a; }
everywhere() { tpu ssh "$name" --worker=all --command="$1"; }
code=halonet-$(git rev-parse --short HEAD) || exit 2
git diff --quiet HEAD || echo "warning: what is not committed is not in this run"

# On each host, once for each commit.
IFS= read -r -d '' setup <<'END'
set -e
rm -rf "$code"
git clone --quiet "$code.bundle" "$code"
cd "$code"
curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH="$HOME/.local/bin:$PATH"
uv venv --quiet --python 3.12
uv pip sync --quiet --require-hashes requirements.lock
uv pip install --quiet -r requirements-tpu-aot.txt google-cloud-storage
keys=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
curl -sf $from/doc/apt-key.gpg | sudo tee $keys > /dev/null
echo "deb [signed-by=$keys] $from gcsfuse-$(lsb_release -cs) main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list
sudo apt-get update -q && sudo apt-get install -qy gcsfuse
sudo install -d -o "$USER" /data
touch .venv/installed
END

# On each host, for each start.
IFS= read -r -d '' start <<'END'
state=/tmp/h4
mkdir -p "$state"
if ! kill -0 "$(cat "$state/pid" 2> /dev/null || echo none)" 2> /dev/null; then
  set -- --config=configs/imagenet.py:halonet_h4 --workdir=gs://bucket/runs/h4 --config.data.data_dir=/data --config.data.workers=16
  if [ 16 -gt 1 ]; then
    metadata() {
      curl -sf -H Metadata-Flavor:Google \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
    }
    # Of each host its address, or "name:number:address"; the first has the coordinator.
    first=$(metadata worker-network-endpoints) && id=$(metadata agent-worker-number) || exit 1
    first=${first%%,*}
    set -- "$@" "--distributed.coordinator=${first##*:}:8476" "--distributed.process_id=$id" \
      --distributed.process_count=16
  fi
  mountpoint -q /data || gcsfuse --implicit-dirs -o ro "imagenet" /data || exit 1
  rm -f "$state/code" "$state/log"
  # It outlives the connection, whose loss is no reason to end.
  setsid bash -c 'trap : TERM; "$@" > "$0/log" 2>&1; echo $? > "$0/code"' "$state" \
    .venv/bin/python -u main.py "$@" < /dev/null &
  echo $! > "$state/pid"
fi
until [ -e "$state/log" ]; do sleep 0.1; done
tail --lines=+1 --follow --sleep-interval=0.5 --pid="$(cat "$state/pid")" "$state/log"
exit "$(cat "$state/code" || echo 1)"
END

ready() {
  local now folder
  now=$(tpu describe "$name" --format='value(state)' 2> /dev/null)
  case $now in
  READY) ;;
  PREEMPTED | TERMINATED | STOPPED | "")
    [ -z "$now" ] || tpu delete "$name" --quiet || return
    tpu create "$name" --type=v5litepod --topology=8x8 --version=v2-alpha-tpuv5-lite \
      --spot \
      --quiet || return
    ;;
  *) echo "$name is $now" && return 1 ;;
  esac
  everywhere "test -e $code/.venv/installed" 2> /dev/null && return
  folder=$(mktemp -d) && git bundle create --quiet "$folder/$code.bundle" HEAD &&
    tpu scp "$folder/$code.bundle" "$name:" --worker=all && everywhere "code=$code; $setup"
}

trap 'everywhere "kill -TERM -- -\$(cat /tmp/$name/pid)"; exit 130' INT
failures=0
while :; do
  status=1
  ready && { everywhere "cd $code || exit 1; $start"; status=$?; }
  case $status in
  0)
    echo "done; gcloud compute tpus tpu-vm delete $name --project=p --zone=us-west4-a"
    exit
    ;;
  2 | 3 | 5 | 7) exit $status ;;
  75) echo "preempted and saved; starting again" ;;
  *)
    ((failures++ < 20)) || exit $status
    echo "exit code $status; starting again, $failures of 20"
    ;;
  esac
  sleep "${RETRY_SECONDS:-30}"
done
