// Callers whom the loop has let in before, so that workers need not ask again before they take a request in.
#pragma once

#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_set>

// Credentials by method. Any thread. What stands here only saves a question: each call is admitted once it is whole.
class Callers {
 public:
  bool knows(int method, std::string_view credential) const;
  void add(int method, std::string_view credential);
  void clear();

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_set<std::string> known_;  // guarded by mutex_
  size_t bytes_ = 0;                       // of known_; guarded by mutex_
};

// The process's; it lives as long as that.
Callers& callers();
