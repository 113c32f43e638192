#!/usr/bin/env bash
# A run on TPUs of a GKE cluster, one slice or several, as a JobSet.
#
#   bash launch/gke.sh build  --image IMAGE                   # this checkout as an image, pushed
#   bash launch/gke.sh submit --name mine --image IMAGE --tpu v5p:4x4x8 [--slices 2] [--spot] -- train ...
#   bash launch/gke.sh logs   --name mine                     # of the first worker
#   bash launch/gke.sh delete --name mine                     # all save and end
#
# More: --namespace N, --service_account S (of Kubernetes, which may write to the bucket),
# --limit N (restarts of the whole job), --dry_run. The job is started again when a worker fails
# or is preempted, and not when it ends with 2.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action="${1:-}"
(($# == 0)) || shift
name='' image='' where=() manifest=()
while (($#)); do
  case "$1" in
    --name) name=$(value "$@"); shift ;;
    --image) image=$(value "$@"); shift ;;
    --namespace) where=(--namespace="$(value "$@")"); shift ;;
    --tpu | --slices | --service_account | --limit) manifest+=("$1" "$(value "$@")"); shift ;;
    --spot) manifest+=("$1") ;;
    --dry_run) dry_run=true ;;
    --) shift && break ;;
    *) fail "unknown option $1; options of stacking-jax come after --" ;;
  esac
  shift
done
kubectl=(kubectl ${where[@]+"${where[@]}"})
[[ -n "$name" || "$action" == build ]] || fail "name the job: --name NAME"

case "$action" in
  build)
    [[ -n "$image" ]] || fail "name the image: --image REGION-docker.pkg.dev/PROJECT/FOLDER/NAME:TAG"
    run docker build --file=launch/Dockerfile --tag="$image" .
    run docker push "$image"
    ;;
  submit)
    [[ -n "$image" ]] || fail "name the image that \`build\` pushed: --image IMAGE"
    stacking_jax .venv/bin/python "$@"
    job=$(python3 launch/jobset.py --name "$name" --image "$image" ${manifest[@]+"${manifest[@]}"} \
      -- "${command[@]}")
    run_with_input "$job" "${kubectl[@]}" create --filename=-
    ;;
  logs)
    run "${kubectl[@]}" logs --follow --tail=-1 --container=train \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run "${kubectl[@]}" delete jobset "$name" ;;
  *) fail "name what to do: build, submit, logs or delete" ;;
esac
