// How a Stream begins: what a call's headers say of it.
#include "stream.h"

namespace {

constexpr std::string_view kAdminDoor("x-forno-door\0admin\0", 19);
constexpr size_t kUnknownBytes = 16 * 1024;  // that Envoy holds of the request of a caller whom nobody knows

}  // namespace

void Stream::on_headers(void* filter, const Methods* methods, bool end) {
  thread_local std::vector<Header> headers;
  headers.resize(envoy_dynamic_module_callback_http_get_headers_size(filter, kRequestHeaders));
  envoy_dynamic_module_callback_http_get_headers(filter, kRequestHeaders, headers.data());
  bool is_grpc = false, transcoded = false;
  std::string_view http_method, bad_timeout, type, length, timeout_ms;
  int64_t timeout = -1;
  metadata.reserve(512);
  for (const Header& h : headers) {
    const std::string_view key(h.key, h.key_size), value(h.value, h.value_size);
    if (key == ":path") {
      path.assign(value);
    } else if (key == ":method") {
      http_method = value;
    } else if (key == "content-type") {
      is_grpc = is_grpc_type(value);
      type = value;
    } else if (key == "content-length") {
      length = value;
    } else if (key == "x-envoy-original-path") {
      transcoded = true;
    } else if (key == "x-request-timeout-ms") {
      timeout_ms = value.empty() ? "-" : value;  // as wrong as any other that is no number
    } else if (key == "grpc-timeout") {
      timeout = timeout_us(value);
      if (timeout < 0) bad_timeout = value;
    }
    const bool of_edge = is_edge_header(key);
    if (of_edge && door_ != Door::kInner) continue;
    if (of_edge || is_credential_header(key)) {
      credential.append(key).push_back('\0');
      credential.append(value).push_back('\0');
    }
    if (!is_transport_header(key)) {
      metadata.append(key).push_back('\0');
      metadata.append(value).push_back('\0');
    }
  }
  if (door_ == Door::kAdmin) credential.append(kAdminDoor);
  // A route that leaves the transcoder out says which method takes the call as it is.
  const std::string* route = is_grpc ? nullptr : route_method(filter);
  http = route != nullptr;
  if (!is_grpc && !http) {
    // Nothing that the transcoder knows as REST, and no gRPC either. The body's form is local_reply_config's business.
    refused_ = true;
    const std::string body = "no such path: " + std::string(http_method) + " " + path.substr(0, path.find('?'));
    envoy_dynamic_module_callback_http_send_response(filter, 404, nullptr, 0, {body.data(), body.size()}, {nullptr, 0});
    return;
  }
  if (http_method != "POST") {
    return refuse(filter, kUnimplemented, "a gRPC call is a POST, this is a " + std::string(http_method));
  }
  if (!methods) return refuse(filter, kUnavailable, "the server is starting");
  if (!bad_timeout.empty()) {
    return refuse(filter, http ? kInvalidArgument : kInternal,
                  "grpc-timeout is '" + std::string(bad_timeout) + "'; expected 1 to 8 digits and H, M, S, m, u or n");
  }
  methods_ = methods;
  const auto found = methods->by_path.find(http ? *route : path);
  if (found == methods->by_path.end()) return refuse(filter, kUnimplemented, "no such method: " + path);
  method = &found->second;
  // An Envoy before this one, or a route with a limit, gives calls without a deadline this one. Envoy keeps it.
  const bool of_envoy = !method->request_streaming && timeout / 1000 == methods_->max_message_us / 1000;
  if (timeout >= 0 && !of_envoy) deadline_us = now_us() + timeout;
  Buffer address{nullptr, 0};
  if (envoy_dynamic_module_callback_http_filter_get_attribute_string(filter, kSourceAddress, &address)) {
    peer.assign(address.data, address.size);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    scheduler_ = envoy_dynamic_module_callback_http_filter_scheduler_new(filter);
  }
  if (method->request_streaming) {
    // What is left in Envoy's buffer; otherwise a stream might fill as much as the largest message.
    envoy_dynamic_module_callback_http_set_buffer_limit(filter, methods_->max_inbox_bytes);
    announced_ = true;
    inbox_.push({EventKind::kCall, shared_from_this(), {}});
  }
  if (http) begin_http(type, length, timeout_ms);
  if (end) return finish_request(filter);
  if (method->guarded && !announced_ && !callers().knows(method->number, credential)) {
    asked_ = true;
    // The transcoder takes this for its own limit, and gives us nothing before it has all.
    if (!transcoded) envoy_dynamic_module_callback_http_set_buffer_limit(filter, kUnknownBytes);
    inbox_.push({EventKind::kAsk, shared_from_this(), {}});
  }
}
