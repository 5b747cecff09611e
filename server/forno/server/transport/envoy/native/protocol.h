// The rules of gRPC over HTTP/2 (grpc/grpc, doc/PROTOCOL-HTTP2.md) that a server needs. Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

constexpr int kInvalidArgument = 3, kDeadlineExceeded = 4, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13,
              kUnavailable = 14;  // statuses

// Before each message: one byte, whether it is compressed, and four of length, most significant first.
constexpr size_t kPrefixBytes = 5;

// The length that a prefix tells.
uint32_t message_bytes(const char* prefix);

// Writes the prefix of a message of so many bytes.
void write_prefix(char* prefix, size_t size, bool compressed);

// A prefix.
std::string prefix_of(uint32_t length);

// A message with its prefix.
std::string frame_message(const char* data, size_t size, bool compressed);

// CLOCK_MONOTONIC.
int64_t now_us();

// "grpc-timeout" in microseconds: up to eight digits and a unit. -1 where it is not one.
int64_t timeout_us(std::string_view text);

// Whether a content type is gRPC's own, not that of gRPC-Web.
bool is_grpc_type(std::string_view content_type);

// The HTTP status that stands for a gRPC status, as Envoy's transcoder has it.
uint32_t http_status(int code);

// "x-request-timeout-ms" in microseconds: 1 to 9 digits, not 0. -1 where it is not one.
int64_t timeout_ms_us(std::string_view text);

// Whether a header belongs to the transport, not to the application's metadata.
bool is_transport_header(std::string_view key);

// Whether a header says who calls; with those below, the list is that of security/headers.py.
bool is_credential_header(std::string_view key);

// Whether it is one by which an edge of ours says so. Of anybody else nobody reads it.
bool is_edge_header(std::string_view key);
