#include "split.h"

namespace {

constexpr size_t kMaxKeyBytes = 4096;
constexpr size_t kMaxIdBytes = 128;
enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kDelimited = 2, kFixed32 = 5 };

// A reader of protobuf's wire format (protobuf.dev, "Encoding"). `good` turns false at the first fault and stays so.
struct Reader {
  std::string_view in;
  size_t at = 0;
  bool good = true;

  bool more() const { return good && at < in.size(); }

  uint64_t varint() {
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 64; shift += 7) {
      if (at >= in.size()) break;
      const auto byte = static_cast<unsigned char>(in[at++]);
      value |= uint64_t{byte & 0x7fU} << shift;
      if (byte < 0x80) return value;
    }
    good = false;
    return 0;
  }

  // The size of a delimited field, which lies within the input.
  size_t size() {
    const uint64_t value = varint();
    if (value > in.size() - at) good = false;
    return good ? static_cast<size_t>(value) : 0;
  }

  // Steps over a field's value.
  void skip(uint32_t wire_type) {
    size_t step = 0;
    switch (wire_type) {
      case kVarint: varint(); return;
      case kFixed64: step = 8; break;
      case kDelimited: step = size(); break;
      case kFixed32: step = 4; break;
      default: good = false; return;  // groups
    }
    if (step > in.size() - at) good = false;
    if (good) at += step;
  }
};

// Adds a tensor to the split; its elements are given by their place in the whole message.
bool split_tensor(std::string_view tensor, size_t offset, const Layout& layout, Split& out) {
  Reader reader{tensor};
  bool has_data = false;
  while (reader.more()) {
    const size_t start = reader.at;
    const uint64_t tag = reader.varint();
    const uint64_t field = tag >> 3;
    if (field == layout.tensor_data && (tag & 7) == kDelimited && !has_data) {
      has_data = true;
      const size_t size = reader.size();
      out.key.append(tensor, start, reader.at - start);
      out.spans.push_back(offset + reader.at);
      out.spans.push_back(size);
      reader.at += size;
    } else if (field >= 1 && field <= layout.tensor_plain) {
      reader.skip(tag & 7);
      out.key.append(tensor, start, reader.at - start);
    } else {
      return false;
    }
    if (out.key.size() > kMaxKeyBytes) return false;
  }
  return reader.good && has_data;
}

bool split_message(std::string_view message, const Layout& layout, Split& out) {
  Reader reader{message};
  while (reader.more()) {
    const size_t start = reader.at;
    const uint64_t tag = reader.varint();
    const uint64_t field = tag >> 3;
    if (field == layout.tensors && (tag & 7) == kDelimited) {
      const size_t size = reader.size();
      out.key.append(message, start, reader.at - start);
      if (!reader.good || !split_tensor(message.substr(reader.at, size), reader.at, layout, out)) return false;
      reader.at += size;
    } else if (field == layout.request_id) {
      if ((tag & 7) != kDelimited || out.id_at) return false;
      out.id_size = reader.size();
      out.id_at = reader.at;
      if (!reader.good || out.id_size > kMaxIdBytes) return false;
      for (char c : message.substr(out.id_at, out.id_size)) {
        if (static_cast<signed char>(c) < 0) return false;  // the parser says whether it is UTF-8
      }
      reader.at += out.id_size;
    } else {
      reader.skip(tag & 7);
      out.key.append(message, start, reader.at - start);
    }
    if (out.key.size() > kMaxKeyBytes) return false;
  }
  return reader.good && !out.spans.empty();
}

}  // namespace

Split split_request(std::string_view message, const Layout& layout) {
  Split out;
  if (!split_message(message, layout, out)) out = Split{};
  return out;
}
