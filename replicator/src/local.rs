//! What stands on this node: does the local VMM use the RAM file?

use std::fs;
use std::io;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use understudy_protocol::control::{ControlClient, ControlError, VmmRequest, VmmState, VmmStatus};
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::Layout;

use crate::durable::ProcessId;
use crate::receiver::LocalVmm;

/// Ask the VMM. One that does not answer, or answers nonsense, counts as using its RAM.
pub fn local_vmm(layout: &Layout, timeout: Duration) -> LocalVmm {
    let mut client = match ControlClient::connect(layout.vmm_socket(), timeout) {
        Ok(client) => client,
        Err(ControlError::Io { source, .. })
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
        {
            return LocalVmm::Absent;
        }
        Err(_) => return LocalVmm::InUse(Generation::ZERO),
    };
    let process = getsockopt(client.stream(), PeerCredentials).ok().and_then(|c| process_id(c.pid().unsigned_abs()));
    match client.call::<_, VmmStatus>(&VmmRequest::Status) {
        Ok(status) if status.state == VmmState::Standby => LocalVmm::Standby(process),
        Ok(status) => LocalVmm::InUse(status.generation),
        Err(_) => LocalVmm::InUse(Generation::ZERO),
    }
}

/// The process with this number, if it lives.
pub fn process_id(pid: u32) -> Option<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything; field 22 is the 20th after it.
    let start = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(ProcessId { pid, start })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_has_a_start_time_and_a_missing_one_has_none() {
        let own = process_id(std::process::id()).unwrap();
        assert!(own.start > 0);
        assert_eq!(process_id(u32::MAX), None);
    }

    #[test]
    fn no_socket_means_no_vmm() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path(), dir.path(), "m");
        assert_eq!(local_vmm(&layout, Duration::from_millis(100)), LocalVmm::Absent);
    }
}
