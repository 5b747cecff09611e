{{- define "forno.name" -}}
{{- $name := printf "%s-%s" .Release.Name .Chart.Name }}
{{- if contains .Chart.Name .Release.Name }}{{ $name = .Release.Name }}{{ end }}
{{- $name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "forno.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "forno.labels" -}}
{{ include "forno.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "forno.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "forno.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "forno.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- /* The port that the server is told to listen on. */ -}}
{{- define "forno.port" -}}
{{ regexFind "[0-9]+$" .Values.config.server.address }}
{{- end }}

{{- /* The port for probes and metrics: one of its own, or that of the calls. */ -}}
{{- define "forno.adminPort" -}}
{{ with dig "security" "admin_address" "" .Values.config }}{{ regexFind "[0-9]+$" . }}{{ else }}{{ include "forno.port" . }}{{ end }}
{{- end }}

{{- define "forno.adminPortName" -}}
{{ if dig "security" "admin_address" "" .Values.config }}admin{{ else }}grpc{{ end }}
{{- end }}

{{- define "forno.appProtocol" -}}
{{ .Values.service.appProtocol | default (ternary "https" "kubernetes.io/h2c" (ne .Values.secrets.tls "")) }}
{{- end }}

{{- /* forno.yaml: the values, and where secrets are mounted. */ -}}
{{- define "forno.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.secrets.tls }}
{{- $files := dict "certificate_file" "/etc/forno/tls/tls.crt" "key_file" "/etc/forno/tls/tls.key" }}
{{- $config = mergeOverwrite $config (dict "security" (dict "tls" $files)) }}
{{- end }}
{{- if .Values.secrets.keys }}
{{- $config = mergeOverwrite $config (dict "security" (dict "keys_file" "/etc/forno/keys/keys.yaml")) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- define "forno.rest" -}}
{{- if ne (.Values.config.server.transport | default "envoy") "grpc" }}true{{ end }}
{{- end }}

{{- /* What the values must say together; the schema sees one at a time. */ -}}
{{- define "forno.check" -}}
{{- if not (or .Values.models.volume .Values.config.models) }}
{{- fail "nothing to serve: set models.volume to a volume with a repository of models, or name models in config.models" }}
{{- end }}
{{- if and .Values.secrets.tls (not (dig "security" "admin_address" "" .Values.config)) }}
{{- fail "secrets.tls needs config.security.admin_address: probes are not encrypted" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled (not (include "forno.rest" .)) }}
{{- fail "serviceMonitor.enabled needs REST, which transport grpc has not; export by config.telemetry.metrics_interval_s" }}
{{- end }}
{{- if .Values.gateway.enabled }}
{{- if not .Values.gateway.parentRefs }}
{{- fail "gateway.enabled needs gateway.parentRefs: the Gateway that the routes attach to" }}
{{- end }}
{{- if not (or .Values.gateway.grpcHostnames .Values.gateway.httpHostnames) }}
{{- fail "gateway.enabled needs gateway.grpcHostnames or gateway.httpHostnames" }}
{{- end }}
{{- range .Values.gateway.grpcHostnames }}
{{- if has . $.Values.gateway.httpHostnames }}
{{- fail (printf "gateway: %s is in grpcHostnames and httpHostnames; a listener takes one kind of route for a hostname" .) }}
{{- end }}
{{- end }}
{{- if and .Values.gateway.httpHostnames (not (include "forno.rest" .)) }}
{{- fail "gateway.httpHostnames needs REST, which transport grpc has not" }}
{{- end }}
{{- end }}
{{- if and .Values.autoscaling.enabled (not (or .Values.autoscaling.pendingRowsPerPod .Values.autoscaling.cpuPercent)) }}
{{- fail "autoscaling.enabled needs autoscaling.pendingRowsPerPod or autoscaling.cpuPercent above 0" }}
{{- end }}
{{- end }}
