// The part of Envoy's dynamic module ABI that Forno uses (Envoy 1.40, ABI "v0.2.0"): HTTP filter hooks that a module
// offers and callbacks that Envoy offers. Pure C; names and types are fixed by Envoy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

struct Buffer {
  const char* data;
  size_t size;
};

struct Header {
  const char* key;
  size_t key_size;
  const char* value;
  size_t value_size;
};

constexpr int kRequestHeaders = 0;
constexpr int kReceivedRequestBody = 0;
constexpr int kBufferedRequestBody = 1;
constexpr int kSourceAddress = 24;

// What the hooks return: keep the stream here; take the body ourselves; leave it in Envoy's buffer, which stops reading.
constexpr int kStopHeaders = 1;
constexpr int kStopBodyAndWatermark = 2;
constexpr int kStopBodyNoBuffer = 3;

extern "C" {
size_t envoy_dynamic_module_callback_http_get_headers_size(void* filter, int type);
bool envoy_dynamic_module_callback_http_get_headers(void* filter, int type, Header* headers);
bool envoy_dynamic_module_callback_http_filter_get_attribute_string(void* filter, int attribute, Buffer* value);
size_t envoy_dynamic_module_callback_http_get_body_chunks_size(void* filter, int type);
bool envoy_dynamic_module_callback_http_get_body_chunks(void* filter, int type, Buffer* chunks);
bool envoy_dynamic_module_callback_http_drain_body(void* filter, int type, size_t bytes);
void envoy_dynamic_module_callback_http_set_buffer_limit(void* filter, uint64_t bytes);
void envoy_dynamic_module_callback_http_send_response(void* filter, uint32_t status, Header* headers, size_t count,
                                                      Buffer body, Buffer details);
void envoy_dynamic_module_callback_http_send_response_headers(void* filter, Header* headers, size_t count, bool end);
void envoy_dynamic_module_callback_http_send_response_data(void* filter, Buffer data, bool end);
void envoy_dynamic_module_callback_http_send_response_trailers(void* filter, Header* headers, size_t count);
void* envoy_dynamic_module_callback_get_most_specific_route_config(void* filter);
void* envoy_dynamic_module_callback_http_filter_scheduler_new(void* filter);
void envoy_dynamic_module_callback_http_filter_scheduler_commit(void* scheduler, uint64_t event);
void envoy_dynamic_module_callback_http_filter_scheduler_delete(void* scheduler);
}

inline Header header(std::string_view key, std::string_view value) {
  return {key.data(), key.size(), value.data(), value.size()};
}

// The name that the route of a stream gives the module; null where it gives none.
inline const std::string* route_method(void* filter) {
  return static_cast<const std::string*>(envoy_dynamic_module_callback_get_most_specific_route_config(filter));
}
