// A recorded list of torch ops and its player: what a call of a model costs beyond its kernels, without Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

struct Argument {
  enum class Kind { VALUE, SLOT, SLOTS, MAYBE_SLOTS, SIZE, SIZES, NUMBER } kind;
  c10::IValue value;
  std::vector<int64_t> slots;  // -1: none; of sizes, which grow with B and N: a, b, c, d of a + b B + c N + d B N each
};

struct Node {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // -1: not wanted
  std::vector<int64_t> last;     // slots that nobody reads after it
};

// A Python number where an op wants a tensor: one that gives way to the types of the others.
at::Tensor wrapped(const at::Scalar& given) {
  at::Tensor found = at::scalar_tensor(given, at::TensorOptions().dtype(given.type()));
  found.unsafeGetTensorImpl()->set_wrapped_number(true);
  return found;
}

// Slots hold tensors: inputs first, then constants and what ops return.
struct Tape : torch::CustomClassHolder {
  std::vector<Node> nodes;
  std::vector<Argument> arguments;  // of the next op
  std::vector<at::Tensor> slots;
  std::vector<int64_t> fixed;  // slots of constants

  void constant(int64_t slot, const at::Tensor& value) {
    at(slot) = value;
    fixed.push_back(slot);
  }
  void slot(int64_t index) { arguments.push_back({Argument::Kind::SLOT, {}, {index}}); }
  void list(const std::vector<int64_t>& indices, bool maybe) {
    arguments.push_back({maybe ? Argument::Kind::MAYBE_SLOTS : Argument::Kind::SLOTS, {}, indices});
  }
  void value(const c10::IValue& given) { arguments.push_back({Argument::Kind::VALUE, given, {}}); }
  void size(const std::vector<int64_t>& factors) { arguments.push_back({Argument::Kind::SIZE, {}, factors}); }
  void sizes(const std::vector<int64_t>& factors) { arguments.push_back({Argument::Kind::SIZES, {}, factors}); }
  void none() { value({}); }
  void whole(int64_t given) { value(given); }
  void real(double given) { value(given); }
  void flag(bool given) { value(given); }
  void text(const std::string& given) { value(given); }
  void device(const std::string& given) { value(c10::Device(given)); }
  void wholes(const std::vector<int64_t>& given) { value(given); }
  void reals(const std::vector<double>& given) { value(given); }
  void flags(const c10::List<bool>& given) { value(given); }

  void number(const at::Scalar& given) { value(wrapped(given)); }
  void number_of_size(const std::vector<int64_t>& factors) {
    arguments.push_back({Argument::Kind::NUMBER, {}, factors});
  }

  void call(const std::string& name, const std::string& overload, const std::vector<int64_t>& results,
            const std::vector<int64_t>& last) {
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    nodes.push_back({op, std::move(arguments), results, last});
    arguments.clear();
  }

  at::Tensor& at(int64_t slot) {
    if (slot >= static_cast<int64_t>(slots.size())) slots.resize(slot + 1);
    return slots[slot];
  }

  // b, n: what sizes grow with.
  std::vector<at::Tensor> play(const std::vector<at::Tensor>& inputs, const std::vector<int64_t>& outputs, int64_t b,
                               int64_t n) {
    auto grown = [&](const int64_t* f) { return f[0] + f[1] * b + f[2] * n + f[3] * b * n; };
    for (size_t i = 0; i < inputs.size(); ++i) at(i) = inputs[i];
    c10::Stack stack;
    for (const Node& node : nodes) {
      stack.clear();
      for (const Argument& a : node.arguments) {
        switch (a.kind) {
          case Argument::Kind::VALUE: stack.push_back(a.value); break;
          case Argument::Kind::SLOT: stack.push_back(slots[a.slots[0]]); break;
          case Argument::Kind::SIZE: stack.push_back(grown(a.slots.data())); break;
          case Argument::Kind::NUMBER: stack.push_back(wrapped(grown(a.slots.data()))); break;
          case Argument::Kind::SIZES: {
            std::vector<int64_t> found;
            for (size_t i = 0; i < a.slots.size(); i += 4) found.push_back(grown(&a.slots[i]));
            stack.push_back(std::move(found));
            break;
          }
          case Argument::Kind::SLOTS: {
            c10::List<at::Tensor> found;
            for (int64_t slot : a.slots) found.push_back(slots[slot]);
            stack.push_back(std::move(found));
            break;
          }
          case Argument::Kind::MAYBE_SLOTS: {
            c10::List<std::optional<at::Tensor>> found;
            for (int64_t slot : a.slots)
              found.push_back(slot < 0 ? std::nullopt : std::optional<at::Tensor>(slots[slot]));
            stack.push_back(std::move(found));
          }
        }
      }
      node.op.callBoxed(&stack);
      if (stack.size() == 1 && stack[0].isTensorList()) {
        auto found = stack[0].toTensorVector();
        for (size_t i = 0; i < node.results.size(); ++i)
          if (node.results[i] >= 0) at(node.results[i]) = found[i];
      } else {
        for (size_t i = 0; i < node.results.size() && i < stack.size(); ++i)
          if (node.results[i] >= 0) at(node.results[i]) = std::move(stack[i]).toTensor();
      }
      for (int64_t slot : node.last) slots[slot] = at::Tensor();
    }
    std::vector<at::Tensor> found;
    for (int64_t slot : outputs) found.push_back(slots[slot]);
    for (int64_t slot : outputs)
      if (std::find(fixed.begin(), fixed.end(), slot) == fixed.end()) slots[slot] = at::Tensor();
    return found;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(edifice_cpu, library) {
  library.class_<Tape>("Tape")
      .def(torch::init<>())
      .def("constant", &Tape::constant)
      .def("slot", &Tape::slot)
      .def("list", &Tape::list)
      .def("size", &Tape::size)
      .def("sizes", &Tape::sizes)
      .def("none", &Tape::none)
      .def("whole", &Tape::whole)
      .def("real", &Tape::real)
      .def("flag", &Tape::flag)
      .def("text", &Tape::text)
      .def("number", &Tape::number)
      .def("number_of_size", &Tape::number_of_size)
      .def("device", &Tape::device)
      .def("wholes", &Tape::wholes)
      .def("reals", &Tape::reals)
      .def("flags", &Tape::flags)
      .def("call", &Tape::call)
      .def("play", &Tape::play);
}
