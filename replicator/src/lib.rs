//! Epochs to the standby, commit, takeover image.
#![forbid(unsafe_code)]
pub mod codec;
pub mod driver;
pub mod durable;
pub mod hook;
pub mod image;
pub mod link;
pub mod local;
pub mod log;
pub mod message;
pub mod process;
pub mod receiver;
pub mod sender;
pub mod standby;
