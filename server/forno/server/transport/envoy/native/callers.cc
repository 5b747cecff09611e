#include "callers.h"

#include <mutex>

namespace {

constexpr size_t kMostCallers = 16384, kMostBytes = 16 << 20;

const std::string& key_of(int method, std::string_view credential) {
  thread_local std::string key;
  key.assign(reinterpret_cast<const char*>(&method), sizeof method);
  return key.append(credential);
}

}  // namespace

bool Callers::knows(int method, std::string_view credential) const {
  const std::string& key = key_of(method, credential);
  std::shared_lock<std::shared_mutex> lock(mutex_);
  return known_.count(key) != 0;
}

void Callers::add(int method, std::string_view credential) {
  const std::string& key = key_of(method, credential);
  std::lock_guard<std::shared_mutex> lock(mutex_);
  if (known_.size() >= kMostCallers || bytes_ + key.size() > kMostBytes) {
    known_.clear();
    bytes_ = 0;
  }
  if (known_.insert(key).second) bytes_ += key.size();
}

void Callers::clear() {
  std::lock_guard<std::shared_mutex> lock(mutex_);
  known_.clear();
  bytes_ = 0;
}

Callers& callers() {
  static Callers& all = *new Callers;
  return all;
}
