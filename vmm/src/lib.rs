//! One machine on KVM.
pub mod devices;
