#include "split.h"

namespace {

constexpr size_t kMaxKeyBytes = 4096;
constexpr size_t kMaxIdBytes = 128;
constexpr size_t kUsualKeyBytes = 96;  // names of a model and its tensors, types, shapes
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

// What is found on the way through a message.
struct Finder {
  const Layout& layout;
  Split& out;
  std::vector<uint64_t>* spans;
  bool has_tensor = false;
  bool id_comes_last = false;  // a tensor, then the id: no tensor may follow, as its distance would vary with the id

  // Adds a tensor; its elements are given by their place in the whole message.
  bool tensor(std::string_view in, size_t offset) {
    if (id_comes_last) return false;
    Reader reader{in};
    bool has_data = false;
    while (reader.more()) {
      const size_t start = reader.at;
      const uint64_t tag = reader.varint();
      const uint64_t field = tag >> 3;
      if (field == layout.tensor_data && (tag & 7) == kDelimited && !has_data) {
        has_data = true;
        const size_t size = reader.size();
        out.key.append(in, start, reader.at - start);
        if (!has_tensor) out.data_at = offset + reader.at;
        has_tensor = true;
        if (spans) spans->insert(spans->end(), {offset + reader.at, size});
        reader.at += size;
      } else if (field >= 1 && field <= layout.tensor_plain) {
        reader.skip(tag & 7);
        out.key.append(in, start, reader.at - start);
      } else {
        return false;
      }
      if (out.key.size() > kMaxKeyBytes) return false;
    }
    return reader.good && has_data;
  }

  bool id(Reader& reader, uint64_t tag) {
    if ((tag & 7) != kDelimited || out.id_at) return false;
    out.id_size = reader.size();
    out.id_at = reader.at;
    if (!reader.good || out.id_size > kMaxIdBytes) return false;
    for (char c : reader.in.substr(out.id_at, out.id_size)) {
      if (static_cast<signed char>(c) < 0) return false;  // the parser says whether it is UTF-8
    }
    reader.at += out.id_size;
    id_comes_last = has_tensor;
    return true;
  }

  // The request that lies in `in` from `at` to its end.
  bool request(std::string_view in, size_t at) {
    Reader reader{in, at};
    while (reader.more()) {
      const size_t start = reader.at;
      const uint64_t tag = reader.varint();
      const uint64_t field = tag >> 3;
      if (field == layout.tensors && (tag & 7) == kDelimited) {
        const size_t size = reader.size();
        out.key.append(in, start, reader.at - start);
        if (!reader.good || !tensor(in.substr(reader.at, size), reader.at)) return false;
        reader.at += size;
      } else if (field == layout.request_id) {
        if (!id(reader, tag)) return false;
      } else {
        reader.skip(tag & 7);
        out.key.append(in, start, reader.at - start);
      }
      if (out.key.size() > kMaxKeyBytes) return false;
    }
    return reader.good && has_tensor;
  }

  // The item that is nothing but a request.
  bool item(std::string_view in) {
    Reader reader{in};
    if (reader.varint() != (layout.item_request << 3 | kDelimited)) return false;
    const size_t size = reader.size();
    return reader.good && reader.at + size == in.size() && request(in, reader.at);
  }
};

}  // namespace

Split split_request(std::string_view message, const Layout& layout, std::vector<uint64_t>* spans) {
  Split out;
  out.key.reserve(kUsualKeyBytes);
  Finder finder{layout, out, spans};
  if (!(layout.item_request ? finder.item(message) : finder.request(message, 0))) out = Split{};
  return out;
}

size_t first_elements_at(std::string_view beginning, const Layout& layout) {
  Reader reader{beginning};
  bool in_item = layout.item_request == 0, in_tensor = false;
  while (reader.more()) {
    const uint64_t tag = reader.varint();
    const uint64_t field = tag >> 3;
    const bool opens = !in_item ? field == layout.item_request : !in_tensor && field == layout.tensors;
    if ((tag & 7) == kDelimited && (opens || (in_tensor && field == layout.tensor_data))) {
      reader.varint();  // its size: more than the beginning holds
      if (!opens) return reader.good ? reader.at : 0;
      (in_item ? in_tensor : in_item) = true;
    } else {
      reader.skip(tag & 7);
    }
  }
  return 0;
}
