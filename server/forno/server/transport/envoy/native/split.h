// Splits a serialized request into what repeats from call to call and what does not.
//
// A client that calls a model again and again sends the same bytes but for the elements of its tensors and its request
// id. What is left without those (the `key`) says everything else: model, names, types, shapes, and the byte count of
// each tensor. So the key is looked at once, by the ordinary parser, and later calls with an equal key need only know
// where their elements lie. Anything that this does not know makes it give up, and the ordinary parser decides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// Field numbers of a request message whose tensors carry their own raw bytes, and of its answer. Of an item of a stream,
// the request is a field; the item of the answer stream has the request's id once more.
struct Layout {
  uint32_t tensors = 0;        // in a request, repeated message: the tensors
  uint32_t request_id = 0;     // in a request, string: its id
  uint32_t tensor_data = 0;    // in a tensor, bytes: its elements
  uint32_t tensor_plain = 0;   // in a tensor, fields up to this number are small and part of the key
  uint32_t answer_id = 0;      // in an answer, string: the request's id
  uint32_t item_request = 0;   // in an item, message: the request; 0 where a message is the request itself
  uint32_t item_id = 0;        // in an item of answers, string: the request's id
  uint32_t item_answer = 0;    // in an item of answers, message: the answer
};

struct Split {
  std::string key;               // empty: not split
  uint64_t data_at = 0;          // where the elements of the first tensor lie
  uint64_t id_at = 0, id_size = 0;  // where the request id lies
};

// All places are offsets into `message`. Messages of an equal key have the elements of their tensors at equal distances
// from `data_at`; `spans`, if given, receives the place of each, offset and size. Never throws but for memory; never
// reads outside `message`.
Split split_request(std::string_view message, const Layout& layout, std::vector<uint64_t>* spans = nullptr);

// Where the elements of the first tensor will lie, told by the beginning of a message; 0 where that does not tell.
size_t first_elements_at(std::string_view beginning, const Layout& layout);
