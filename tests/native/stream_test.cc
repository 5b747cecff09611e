// Streams under load without Envoy: workers that behave as Envoy's do (and as it may), and an event loop that answers.
//
// Every call has a plan: what the client sends, in which pieces, and whether it goes away on the way. Its answer must be
// what the plan says, whatever the pieces and the order of events were. Built with the sanitizers by tools/sanitize.sh.
//
//     stream_test [CALLS [SEED]]
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <thread>

#include "stream.h"
#include "stream_callers.h"
#include "stream_plans.h"

namespace {

constexpr int kWorkers = 2, kOpenAtOnce = 40;

class Worker;

// One HTTP stream, as Envoy's filter for it.
struct Filter {
  Worker* worker;
  Plan plan;
  StreamPtr* state = nullptr;  // null once destroyed
  std::vector<std::pair<std::string, std::string>> headers;
  std::vector<std::string> received;  // the piece that on_body is called for
  std::vector<std::string> buffered;  // pieces that it left here
  size_t sent = 0;                    // of plan.body
  bool begun = false, request_ended = false, stopped_reading = false;
  int above = 0;
  int headers_answered = 0;
  bool answer_ended = false;
  std::string answer, status;
};

using FilterPtr = std::shared_ptr<Filter>;

struct Scheduler {
  std::weak_ptr<Filter> filter;
  Worker* worker;
};

Inbox& inbox() {
  static Inbox& one = *new Inbox;
  return one;
}
Methods methods;
std::atomic<int> calls_left{0}, workers_running{0};
std::atomic<size_t> answers_checked{0};

class Worker {
 public:
  explicit Worker(unsigned seed) : random(seed) {}

  void run() {
    while (true) {
      while (filters_.size() < kOpenAtOnce && calls_left.fetch_sub(1) > 0) open();
      run_scheduled();
      if (filters_.empty()) break;
      auto at = filters_.begin();
      std::advance(at, below(random, filters_.size()));
      const FilterPtr filter = at->second;
      step(*filter);
      if (!filter->state) filters_.erase(filter.get());
    }
    workers_running--;
  }

  void post(std::weak_ptr<Filter> filter) {
    std::lock_guard<std::mutex> lock(mutex_);
    scheduled_.push_back(std::move(filter));
  }

  // Envoy's filter is no more; its hooks are not called again.
  void destroy(Filter& filter) {
    if (!filter.state) return;
    StreamPtr* state = filter.state;
    filter.state = nullptr;
    (*state)->on_gone();
    (*state)->on_gone();  // stream_complete, then destroy
    delete state;
  }

  std::weak_ptr<Filter> weak(Filter* filter) { return filters_.at(filter); }

  void finish(Filter& filter);

  Random random;

 private:
  void open();
  void step(Filter& filter);

  void run_scheduled() {
    std::vector<std::weak_ptr<Filter>> scheduled;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      scheduled.swap(scheduled_);
    }
    for (const auto& weak : scheduled) {
      if (const FilterPtr filter = weak.lock(); filter && filter->state) {
        const StreamPtr stream = *filter->state;
        stream->on_scheduled(filter.get());
      }
    }
  }

  std::map<Filter*, FilterPtr> filters_;
  std::mutex mutex_;
  std::vector<std::weak_ptr<Filter>> scheduled_;  // guarded by mutex_
};

void Worker::open() {
  auto filter = std::make_shared<Filter>();
  filter->worker = this;
  filter->plan = make_plan(random);
  const size_t door = below(random, std::size(kDoors));
  filter->state = new StreamPtr(std::make_shared<Stream>(inbox(), kDoors[door]));
  filter->headers = headers_of(filter->plan, door, random);
  if (filter->plan.http) {
    filter->headers[2].second = "application/json";
    if (below(random, 2)) filter->headers.emplace_back("content-length", std::to_string(filter->plan.body.size()));
  }
  if (!filter->plan.timeout.empty()) filter->headers.emplace_back("grpc-timeout", filter->plan.timeout);
  filters_[filter.get()] = filter;
}

// One thing that may happen to a stream.
void Worker::step(Filter& filter) {
  if (!filter.state) return;
  if (filter.answer_ended) return finish(filter);
  if (filter.plan.goes_away && below(random, 30) == 0) return destroy(filter);
  if (filter.above && below(random, 2)) {
    filter.above--;
    const StreamPtr stream = *filter.state;
    stream->on_watermark(false);
    return;
  }
  const StreamPtr stream = *filter.state;
  if (!filter.begun) {
    filter.begun = true;
    filter.request_ended = filter.plan.body.empty() && !filter.plan.trailers;
    stream->on_headers(&filter, &methods, filter.request_ended);
  } else if (!filter.request_ended && !(filter.stopped_reading && below(random, 4))) {
    const size_t left = filter.plan.body.size() - filter.sent;
    if (!left && filter.plan.trailers) {
      filter.request_ended = true;
      stream->on_trailers(&filter);
    } else {
      const size_t size = std::min(left, below(random, 2) ? below(random, 12) : below(random, left > 10000 ? 40000 : 3000));
      const bool end = size == left && !filter.plan.trailers;
      const std::string piece = filter.plan.body.substr(filter.sent, size);
      filter.sent += size;
      // Slices as Envoy's buffers have them. At the end it moves the last piece to those that were left.
      std::vector<std::string> slices;
      const size_t cut = below(random, size + 1);
      for (const std::string& slice : {piece.substr(0, cut), piece.substr(cut)}) {
        if (!slice.empty()) slices.push_back(slice);
      }
      auto& target = end && !filter.buffered.empty() ? filter.buffered : filter.received;
      target.insert(target.end(), slices.begin(), slices.end());
      filter.request_ended = end;
      if (stream->on_body(&filter, end) == kStopBodyAndWatermark) {
        filter.buffered.insert(filter.buffered.end(), filter.received.begin(), filter.received.end());
        filter.stopped_reading = true;
      }
      filter.received.clear();
      if (filter.buffered.empty()) filter.stopped_reading = false;
    }
  }
}

// The answer is complete: it must be what was planned.
void Worker::finish(Filter& filter) {
  if (filter.status != filter.plan.status) {
    fprintf(stderr, "%s: status %s, expected %s\n", filter.plan.path.c_str(), filter.status.c_str(), filter.plan.status.c_str());
  }
  CHECK(filter.status == filter.plan.status);
  if (filter.plan.items && filter.status == "0") {
    CHECK(messages_of(filter.answer) == messages_of(filter.plan.expected));
  } else {
    CHECK((filter.status != "0" && filter.status != "200") || filter.answer == filter.plan.expected);
  }
  answers_checked++;
  destroy(filter);
}

// The event loop: echoes every message, in time or late, and says OK when the client has finished.
class Loop {
 public:
  void run() {
    pollfd ready{inbox().fd(), POLLIN, 0};
    while (workers_running || !calls_.empty()) {
      poll(&ready, 1, 1);
      inbox().take(taken_);
      for (Event& event : taken_) handle(event);
      taken_.clear();
      for (auto at = calls_.begin(); at != calls_.end();) at = work(at->second) ? std::next(at) : calls_.erase(at);
    }
    CHECK(aligned_ * 3 > large_);  // where the first piece is large enough to tell; by chance it were a sixteenth
  }

 private:
  struct Call {
    StreamPtr stream;
    std::deque<std::string> messages;
    std::vector<Message> items;  // on the short way
    bool unary = false, half_closed = false, cancelled = false, waits = false, started = false;
    bool waits_for_items = false, items_are_done = false;
  };

  void handle(Event& event) {
    if (event.kind == EventKind::kCall) {
      CHECK(!calls_.count(event.stream.get()));
      if (event.stream->gone()) return;
      check_caller(*event.stream);
      if (is_unknown(*event.stream)) {  // which the end of the request came too early to ask
        CHECK(event.stream->http && event.message.view().empty());
        return turn_away(*event.stream);
      }
      Call& call = calls_[event.stream.get()];
      call.stream = event.stream;
      call.unary = event.stream->method->number == 0 || event.stream->http;
      if (event.stream->http) check_split(event.message);
      if (call.unary) call.messages.emplace_back(event.message.view());
      if (event.message.bytes.size() > 65600 && !event.message.split.key.empty()) {  // can be read as numbers where it is
        aligned_ += reinterpret_cast<uintptr_t>(event.message.view().data() + event.message.split.data_at) % 16 == 0;
        large_++;
      }
      return;
    }
    if (event.kind == EventKind::kAsk) {
      CHECK(!calls_.count(event.stream.get()));
      if (is_unknown(*event.stream)) return turn_away(*event.stream);
      event.stream->let_in(below(random_, 4) == 0);
      if (below(random_, 1000) == 0) callers().clear();
      return;
    }
    const auto found = calls_.find(event.stream.get());
    if (found == calls_.end()) return;
    Call& call = found->second;
    switch (event.kind) {
      case EventKind::kMessage:
        CHECK(!call.half_closed && !call.stream->half_closed);
        if (event.message.split.key.empty()) {
          call.messages.push_back(std::move(event.message.bytes));
          break;
        }
        call.stream->hold(std::move(event.message));
        release(call);
        break;
      case EventKind::kRelease:
        call.stream->released();
        release(call);
        break;
      case EventKind::kHalfClose:
        CHECK(!call.half_closed && !call.stream->half_closed);
        call.stream->half_closed = true;
        release(call);
        break;
      case EventKind::kItemsDone:
        CHECK(call.waits_for_items && call.items.empty());
        call.items_are_done = true;
        break;
      case EventKind::kCancel:
        CHECK(!call.cancelled);
        call.cancelled = true;
        call.items.clear();
        call.stream->drop_items();
        break;
      case EventKind::kWritable:
        call.waits = false;
        break;
      default:
        CHECK(false);
    }
  }

  void release(Call& call) {
    Message message;
    while (call.stream->next_item(message)) {
      CHECK(message.view().size() > message.split.data_at && !message.split.key.empty());
      call.items.push_back(std::move(message));
    }
    CHECK(call.items.size() <= kMaxItems);
    if (call.stream->half_closed && !call.stream->has_waiting()) {
      call.stream->half_closed = false;
      call.half_closed = true;
    }
  }

  // One message in pieces, as an answer is given.
  void reply(Stream& stream, std::string_view message) {
    const size_t cut = below(random_, message.size() + 1);
    const Piece pieces[] = {message.substr(0, cut), {}, message.substr(cut)};
    stream.reply(pieces, 3);
    if (below(random_, 3)) stream.commit();
    stream.commit();
  }

  // False when the call has ended.
  bool work(Call& call) {
    if (below(random_, 3) == 0) return true;
    if (call.cancelled) return below(random_, 2);  // a handler may take its time, and still try to answer
    if (call.stream->http) {
      std::vector<Part> response;
      response.push_back({Part::kResponse, {{":status", "200"}}, call.messages.front()});
      call.stream->send(std::move(response));
      return false;
    }
    if (call.unary) {
      reply(*call.stream, call.messages.front());
      return false;
    }
    while (!call.items.empty() && below(random_, 4)) {  // in any order; now and then one leaves the short way
      std::swap(call.items[below(random_, call.items.size())], call.items.back());
      const Message item = std::move(call.items.back());
      call.items.pop_back();
      if (below(random_, 8)) {
        reply(*call.stream, item.view());
        call.stream->item_done(item.bytes.size());
      } else {
        call.messages.push_back(item.bytes);
        call.stream->item_done(0);
      }
    }
    if (call.waits) return true;
    std::vector<Part> parts;
    while (!call.messages.empty() && below(random_, 8)) {
      const std::string& message = call.messages.front();
      if (!call.started) parts.push_back({Part::kHeaders, {{"x-b", "2"}}, {}});
      call.started = true;
      parts.push_back({Part::kMessage, {}, frame_message(message.data(), message.size(), false)});
      call.stream->consumed(message.size());
      call.messages.pop_front();
    }
    bool ends = call.half_closed && call.messages.empty();
    if (ends && !call.waits_for_items) call.waits_for_items = call.stream->notify_items_done();
    ends = ends && (!call.waits_for_items || call.items_are_done);
    if (ends) parts.push_back({Part::kStatus, {{"grpc-status", "0"}}, {}});
    if (!parts.empty()) call.stream->send(std::move(parts));
    if (ends) return false;
    if (call.stream->pending_bytes() > 2000 && below(random_, 2)) call.waits = call.stream->notify_writable();
    return true;
  }

  std::map<Stream*, Call> calls_;
  std::vector<Event> taken_;
  size_t aligned_ = 0, large_ = 0;
  Random random_{7};
};

Filter& filter_of(void* filter) { return *static_cast<Filter*>(filter); }

void take_headers(Filter& filter, Header* headers, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (std::string_view(headers[i].key, headers[i].key_size) == (filter.plan.http ? ":status" : "grpc-status")) {
      CHECK(filter.status.empty());
      filter.status.assign(headers[i].value, headers[i].value_size);
    }
  }
}

// The end of an answer: where the request has ended too, Envoy destroys the filter before it returns.
void end_answer(Filter& filter) {
  CHECK(!filter.answer_ended);
  CHECK(!filter.status.empty());
  filter.answer_ended = true;
  if (filter.request_ended) filter.worker->finish(filter);
}

std::vector<std::string>& body_of(void* filter, int type) {
  return type == kBufferedRequestBody ? filter_of(filter).buffered : filter_of(filter).received;
}

}  // namespace

extern "C" {

size_t envoy_dynamic_module_callback_http_get_headers_size(void* filter, int) { return filter_of(filter).headers.size(); }

bool envoy_dynamic_module_callback_http_get_headers(void* filter, int, Header* out) {
  for (const auto& [key, value] : filter_of(filter).headers) *out++ = {key.data(), key.size(), value.data(), value.size()};
  return true;
}

bool envoy_dynamic_module_callback_http_filter_get_attribute_string(void*, int, Buffer* value) {
  *value = {"192.0.2.1:1", 11};
  return true;
}

size_t envoy_dynamic_module_callback_http_get_body_chunks_size(void* filter, int type) { return body_of(filter, type).size(); }

bool envoy_dynamic_module_callback_http_get_body_chunks(void* filter, int type, Buffer* out) {
  for (const std::string& chunk : body_of(filter, type)) *out++ = {chunk.data(), chunk.size()};
  return true;
}

bool envoy_dynamic_module_callback_http_drain_body(void* filter, int type, size_t bytes) {
  size_t total = 0;
  for (const std::string& chunk : body_of(filter, type)) total += chunk.size();
  CHECK(total == bytes);
  body_of(filter, type).clear();
  return true;
}

void envoy_dynamic_module_callback_http_set_buffer_limit(void*, uint64_t bytes) { CHECK(bytes == kMaxInboxBytes || bytes == 16384); }

void* envoy_dynamic_module_callback_get_most_specific_route_config(void* filter) {
  static std::string method = "http:/echo";
  return filter_of(filter).plan.http ? &method : nullptr;
}

void envoy_dynamic_module_callback_http_send_response(void* at, uint32_t status, Header*, size_t, Buffer, Buffer) {
  Filter& filter = filter_of(at);
  CHECK(filter.plan.http && filter.state && !filter.answer_ended && !filter.headers_answered);
  filter.status = std::to_string(status);
  end_answer(filter);
}

void envoy_dynamic_module_callback_http_send_response_headers(void* at, Header* headers, size_t count, bool end) {
  Filter& filter = filter_of(at);
  CHECK(filter.state && !filter.answer_ended && !filter.headers_answered);
  filter.headers_answered++;
  take_headers(filter, headers, count);
  if (end) end_answer(filter);
}

void envoy_dynamic_module_callback_http_send_response_data(void* at, Buffer data, bool end) {
  Filter& filter = filter_of(at);
  CHECK(filter.state && filter.headers_answered && !filter.answer_ended && end == filter.plan.http);
  filter.answer.append(data.data, data.size);
  if (end) return end_answer(filter);
  Random& random = filter.worker->random;
  const StreamPtr stream = *filter.state;
  if (below(random, 8) == 0) {  // Envoy says so in the middle of its own writing
    filter.above++;
    stream->on_watermark(true);
  }
  if (filter.plan.goes_away && below(random, 20) == 0) filter.worker->destroy(filter);  // the connection broke just now
}

void envoy_dynamic_module_callback_http_send_response_trailers(void* at, Header* headers, size_t count) {
  Filter& filter = filter_of(at);
  CHECK(filter.state && filter.headers_answered && !filter.answer_ended);
  take_headers(filter, headers, count);
  end_answer(filter);
}

void* envoy_dynamic_module_callback_http_filter_scheduler_new(void* filter) {
  Worker* worker = filter_of(filter).worker;
  return new Scheduler{worker->weak(&filter_of(filter)), worker};
}

void envoy_dynamic_module_callback_http_filter_scheduler_commit(void* scheduler, uint64_t) {
  const Scheduler* one = static_cast<Scheduler*>(scheduler);
  one->worker->post(one->filter);
}

void envoy_dynamic_module_callback_http_filter_scheduler_delete(void* scheduler) { delete static_cast<Scheduler*>(scheduler); }
}

int main(int argc, char** argv) {
  const int calls = argc > 1 ? atoi(argv[1]) : 20000;
  alarm(300);  // a call that never ends must not hang its caller
  const unsigned seed = argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1;
  const Layout layout{1, 2, 3, 2, 4, 0, 0, 0};
  Layout item_layout = layout;
  item_layout.item_request = 6;
  methods.by_path = {{"/unary", {0, false, true, layout}}, {"/stream", {1, true, true}}, {"/items", {2, true, false, item_layout}},
                     {"http:/echo", {3, false, true, layout}}};
  methods.max_items = kMaxItems;
  methods.max_message_us = 60000000;
  methods.max_message_bytes = kMaxMessageBytes;
  methods.max_inbox_bytes = kMaxInboxBytes;
  calls_left = calls;
  workers_running = kWorkers;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  for (int i = 0; i < kWorkers; i++) {
    workers.push_back(std::make_unique<Worker>(seed * kWorkers + i));
    threads.emplace_back(&Worker::run, workers.back().get());
  }
  Loop loop;
  loop.run();
  for (std::thread& thread : threads) thread.join();
  std::vector<Event> left;
  inbox().take(left);
  for (const Event& event : left) CHECK(event.kind == EventKind::kCancel || event.kind == EventKind::kWritable);
  CHECK(answers_checked > static_cast<size_t>(calls) / 2);
  printf("%d calls, %zu answers checked\n", calls, answers_checked.load());
  return 0;
}
