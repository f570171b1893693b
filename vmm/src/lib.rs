//! One machine on KVM: vCPUs, RAM, devices, capture, output gate.
//!
//! | what | modules |
//! |---|---|
//! | guest's hardware | [`devices`] (pure), [`hardware`] (all of them behind one lock), [`plug`], [`acpi`], [`boot`], [`cpuid`], [`routing`] |
//! | execution | [`vcpus`] (threads), [`core`] (what they share), [`clock`], [`memory`] |
//! | state | [`vcpu_state`], [`vm_state`], [`raw`], [`container`], [`save`] |
//! | checkpoints | [`session`] (the cut), [`capture`] (how pages are copied) |
//! | outputs | [`gate`] (pure), [`port`], [`pump`], [`backend`] |
//! | network | [`net`] |
//! | disks | [`storage`] (behind the device [`devices::virtio::block`]) |
//! | life | [`machine`], [`session`] (replication), [`control`] (socket), [`run`] (process) |
//! | unsafe | [`sys`]; blocks in [`memory`], [`capture::gather`], [`capture::lock`] |
//!
//! A byte that the guest writes to COM1 goes: vCPU exit → [`hardware`] → UART → stream ([`gate`]) → (cut, commit: [`session`]) → [`pump`] →
//! [`backend`]. A checkpoint goes: request ([`control`]) → [`session`] → stop ([`vcpus`]) → state ([`machine`]) → pages ([`memory`]) → arena.

pub mod acpi;
pub mod backend;
pub mod boot;
pub mod capture;
pub mod clock;
pub mod container;
pub mod control;
pub mod core;
pub mod cpuid;
pub mod devices;
pub mod gate;
pub mod hardware;
pub mod machine;
pub mod memory;
pub mod net;
pub mod plug;
pub mod port;
pub mod pump;
pub mod raw;
pub mod routing;
pub mod run;
pub mod save;
pub mod session;
pub mod storage;
pub mod sys;
pub mod vcpu_state;
pub mod vcpus;
pub mod vm_state;
