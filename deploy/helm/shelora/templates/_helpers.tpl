{{/* Prefix of every object's name. */}}
{{- define "shelora.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels by which a component is selected. Takes (list $ "component"). */}}
{{- define "shelora.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of an object of a component. Takes (list $ "component"). */}}
{{- define "shelora.labels" -}}
{{- $root := index . 0 -}}
{{ include "shelora.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: shelora
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image's reference. Takes (list $ image). */}}
{{- define "shelora.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $name := empty $image.registry | ternary $image.repository (printf "%s/%s" $image.registry $image.repository) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Pod security, profile restricted. Takes (list $ user). */}}
{{- define "shelora.podSecurity" -}}
{{- $user := index . 1 -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with (index . 0).Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $user | int64 }}
  runAsGroup: {{ $user | int64 }}
  fsGroup: {{ $user | int64 }}
  # Only a new volume: later, the key authority's files keep the modes that it gave them.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "shelora.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Where a component's pods may run. Takes a component's values. */}}
{{- define "shelora.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Spreads replicas over zones and nodes. Takes (list $ "component" values). */}}
{{- define "shelora.spread" -}}
{{- $selector := include "shelora.selector" (list (index . 0) (index . 1)) -}}
{{- $unsatisfiable := (index . 2).topologySpread.whenUnsatisfiable -}}
topologySpreadConstraints:
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $unsatisfiable }}
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Settings of every server. Takes (list $ "SHELORA_X_"). */}}
{{- define "shelora.serverEnv" -}}
{{- $values := (index . 0).Values -}}
{{- $prefix := index . 1 -}}
- {name: GRPC_VERBOSITY, value: ERROR}
- {name: {{ $prefix }}METRICS_HOST, value: 0.0.0.0}
- {name: {{ $prefix }}METRICS_PORT, value: "9464"}
- {name: {{ $prefix }}HEALTH_LISTEN, value: "0.0.0.0:7110"}
- {name: {{ $prefix }}LOG_JSON, value: "true"}
- {name: {{ $prefix }}LOG_LEVEL, value: {{ $values.logLevel }}}
- {name: {{ $prefix }}SHUTDOWN_GRACE_S, value: {{ $values.shutdownGraceSeconds | quote }}}
{{- end -}}

{{/* Settings of a server that enrols with a workload key and stores in Redis. Takes (list $ "SHELORA_X_"). */}}
{{- define "shelora.memberEnv" -}}
{{- $root := index . 0 -}}
{{- $prefix := index . 1 -}}
{{- $authority := printf "%s-key-authority" (include "shelora.fullname" $root) -}}
{{ include "shelora.serverEnv" . }}
- {name: {{ $prefix }}IDENTITY, value: /run/shelora/identity}
- {name: {{ $prefix }}KEY_AUTHORITY_ADDRESS, value: "{{ $authority }}:7102"}
- {name: {{ $prefix }}ENROLMENT_ADDRESS, value: "{{ $authority }}:7099"}
- {name: {{ $prefix }}WORKLOAD_KEY_FILE, value: /secrets/workload/key}
- {name: {{ $prefix }}REDIS_URL, value: {{ include "shelora.redisUrl" $root | quote }}}
{{- if include "shelora.redisSecret" $root }}
- {name: {{ $prefix }}REDIS_PASSWORD_FILE, value: /secrets/redis/password}
{{- end }}
{{- end -}}

{{- define "shelora.redisUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "shelora.fullname" . }}-redis:6379/0
{{- else if not .Values.externalRedis.url -}}
{{- fail "externalRedis.url: with redis.enabled=false, say where your Redis is: redis://HOST:PORT/DB or rediss://HOST:PORT/DB" -}}
{{- else if .Values.externalRedis.caSecret -}}
{{ .Values.externalRedis.url }}{{ contains "?" .Values.externalRedis.url | ternary "&" "?" }}ssl_ca_certs=/secrets/redis-ca/ca.crt
{{- else -}}
{{ .Values.externalRedis.url }}
{{- end -}}
{{- end -}}

{{- define "shelora.redisPort" -}}
{{- if .Values.redis.enabled -}}
6379
{{- else -}}
{{- regexFind ":[0-9]+(/|\\?|$)" .Values.externalRedis.url | trimAll ":/?" | default "6379" -}}
{{- end -}}
{{- end -}}

{{/* Secret with the password of Redis; empty if there is none. */}}
{{- define "shelora.redisSecret" -}}
{{- if .Values.redis.enabled -}}
{{- default (printf "%s-redis" (include "shelora.fullname" .)) .Values.redis.existingSecret -}}
{{- else -}}
{{- .Values.externalRedis.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* What a member mounts. Takes (list $ "component" key). */}}
{{- define "shelora.memberVolumes" -}}
{{- $root := index . 0 -}}
{{- $key := index . 2 -}}
- name: tmp
  emptyDir: {}
- name: run
  emptyDir: {medium: Memory, sizeLimit: 8Mi}
- name: workload-key
  secret:
    secretName: {{ default (printf "%s-%s-key" (include "shelora.fullname" $root) (index . 1)) $key.existingSecret }}
    defaultMode: 0440
    items:
      - {key: {{ $key.key }}, path: key}
{{- with include "shelora.redisSecret" $root }}
- name: redis-password
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: {{ $root.Values.redis.enabled | ternary $root.Values.redis.existingSecretKey $root.Values.externalRedis.existingSecretKey }}, path: password}
{{- end }}
{{- if include "shelora.redisCa" $root }}
- name: redis-ca
  secret:
    secretName: {{ $root.Values.externalRedis.caSecret }}
    defaultMode: 0440
    items:
      - {key: {{ $root.Values.externalRedis.caSecretKey }}, path: ca.crt}
{{- end }}
{{- end -}}

{{- define "shelora.memberMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: run, mountPath: /run/shelora}
- {name: workload-key, mountPath: /secrets/workload, readOnly: true}
{{- if include "shelora.redisSecret" . }}
- {name: redis-password, mountPath: /secrets/redis, readOnly: true}
{{- end }}
{{- if include "shelora.redisCa" . }}
- {name: redis-ca, mountPath: /secrets/redis-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "shelora.redisCa" -}}
{{- if not .Values.redis.enabled -}}{{ .Values.externalRedis.caSecret }}{{- end -}}
{{- end -}}

{{/* Probes of a gRPC server, on the port without TLS that answers nothing else. Takes (list $ "service.Name" seconds),
where the seconds are those that it may take to start. */}}
{{- define "shelora.probes" -}}
startupProbe:
  grpc: {port: 7110}
  periodSeconds: 2
  failureThreshold: {{ div (index . 2) 2 }}
livenessProbe:
  grpc: {port: 7110}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 7110, service: {{ index . 1 }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
lifecycle:
  preStop:
    sleep: {seconds: {{ (index . 0).Values.preStopSeconds }}}
{{- end -}}

{{/* Names of a service within the cluster, then those outside, as JSON. Takes (list $ "component" externalNames). */}}
{{- define "shelora.names" -}}
{{- $root := index . 0 -}}
{{- $service := printf "%s-%s" (include "shelora.fullname" $root) (index . 1) -}}
{{- $namespaced := printf "%s.%s" $service $root.Release.Namespace -}}
{{- $inside := list $service $namespaced (printf "%s.svc" $namespaced) (printf "%s.svc.%s" $namespaced $root.Values.clusterDomain) -}}
{{- concat $inside (index . 2) | toJson -}}
{{- end -}}

{{/* Where agents exchange tokens, as they dial it. */}}
{{- define "shelora.enrolment" -}}
{{- if eq .Values.exposure.type "none" -}}
{{ include "shelora.fullname" . }}-key-authority.{{ .Release.Namespace }}.svc:7099
{{- else -}}
{{- $port := eq .Values.exposure.type "gateway" | ternary .Values.exposure.gateway.port 443 -}}
{{ first (concat .Values.externalNames.enrolment .Values.externalNames.keyAuthority) }}:{{ eq .Values.exposure.type "loadBalancer" | ternary 7099 $port }}
{{- end -}}
{{- end -}}

{{/* Seconds a pod may take to stop: withdrawal, drain, and some to spare. */}}
{{- define "shelora.stopSeconds" -}}
{{- add .Values.preStopSeconds .Values.shutdownGraceSeconds 10 -}}
{{- end -}}

{{/* A key that was made at the first install, 64 hexadecimal digits. Takes (list $ "secret's name" "key"). */}}
{{- define "shelora.keptKey" -}}
{{- $root := index . 0 -}}
{{- $kept := (lookup "v1" "Secret" $root.Release.Namespace (index . 1)).data | default dict -}}
{{- get $kept (index . 2) | default (randBytes 32 | b64dec | printf "%x" | b64enc) -}}
{{- end -}}
