// What tests call to have several emulated devices (ctypes).

#include "emulator.h"

// Launches go to the queue of this device from now on; -1: they run at once.
extern "C" void emulator_choose(int device) {
  emulator::queue = device;
  if (device >= static_cast<int>(emulator::queues.size())) emulator::queues.resize(device + 1);
}

// Runs what lies in the queues.
extern "C" void emulator_run() {
  emulator::queue = -1;
  emulator::run_queues();
  emulator::queues.clear();
}
