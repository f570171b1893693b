//! The system calls of the network that no crate wraps: the ioctls of tap and macvtap devices, and those of an interface by its name
//! (`netdevice(7)`, `linux/if_tun.h`, `linux/sockios.h`). All `unsafe` of the network is here.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use understudy_protocol::nic::Mac;

use crate::devices::virtio::net::Offloads;

/// `linux/sockios.h`; crate `libc` has it for Android only.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const SIOCDEVPRIVATE: libc::c_ulong = 0x89f0;
/// `linux/if_bridge.h`; a bridge has at most so many ports.
const BRCTL_GET_PORT_LIST: libc::c_ulong = 7;
const BRIDGE_PORTS: usize = 1024;

/// `struct ifreq` with this name. Names were checked when they were read: shorter than the kernel's field.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data; all zeroes is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn call(fd: &impl AsRawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every caller's number is one whose argument is a `struct ifreq`, which the kernel reads and writes within its bounds.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(request)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Open a tap's device node; it never waits.
pub fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// Make `device` a queue of the tap interface `name`, which comes to be if it is not there.
pub fn tap(device: &File, name: &str, several: bool) -> io::Result<()> {
    let mut request = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | if several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    call(device, libc::TUNSETIFF as libc::c_ulong, &mut request)
}

/// The same of a macvtap's device node: only the flags are said.
pub fn macvtap(device: &File, several: bool) -> io::Result<()> {
    tap(device, "", several)
}

/// Each packet has a header of so many bytes.
pub fn set_header(device: &File, bytes: usize) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What may be left to whoever reads.
pub fn set_offloads(device: &File, offloads: Offloads) -> io::Result<()> {
    let Offloads { csum, tso4, tso6, ecn } = offloads;
    let all =
        [(csum, libc::TUN_F_CSUM), (tso4, libc::TUN_F_TSO4), (tso6, libc::TUN_F_TSO6), (ecn, libc::TUN_F_TSO_ECN)];
    let bits = all.into_iter().filter(|(on, _)| *on).fold(0, |bits, (_, bit)| bits | bit as libc::c_ulong);
    // SAFETY: TUNSETOFFLOAD takes its argument as a number.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETOFFLOAD as _, bits) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The interfaces of the network namespace in which this was made.
#[derive(Debug)]
pub struct Interfaces(OwnedFd);

impl Interfaces {
    /// Those of the calling thread's.
    pub fn here() -> io::Result<Self> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        Ok(Self(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?))
    }

    /// The number of an interface, if there is one of this name.
    pub fn index(&self, name: &str) -> io::Result<i32> {
        let mut request = request(name)?;
        call(&self.0, libc::SIOCGIFINDEX as libc::c_ulong, &mut request)?;
        // SAFETY: the kernel has filled in this field of the union.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// Whether it is up.
    pub fn is_up(&self, name: &str) -> io::Result<bool> {
        let mut request = request(name)?;
        call(&self.0, libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
        // SAFETY: the kernel has filled in this field of the union.
        Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_UP != 0)
    }

    /// Switch it on or off. When this returns with it off, nothing that is written to it goes anywhere.
    pub fn set_up(&self, name: &str, up: bool) -> io::Result<()> {
        let mut request = request(name)?;
        call(&self.0, libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
        // SAFETY: the kernel has filled in this field of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let bit = libc::IFF_UP as libc::c_short;
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
        call(&self.0, libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)
    }

    /// Put it into a bridge.
    pub fn enslave(&self, name: &str, bridge: &str) -> io::Result<()> {
        let index = self.index(name)?;
        let mut request = request(bridge)?;
        request.ifr_ifru.ifru_ifindex = index;
        call(&self.0, SIOCBRADDIF, &mut request)
    }

    /// Whether it is in this bridge. (Asked of the bridge itself: `/sys` shows the interfaces of the namespace that it was mounted in.)
    pub fn in_bridge(&self, name: &str, bridge: &str) -> io::Result<bool> {
        let index = self.index(name)?;
        let mut ports = [0 as libc::c_int; BRIDGE_PORTS];
        let mut arguments =
            [BRCTL_GET_PORT_LIST, ports.as_mut_ptr() as libc::c_ulong, BRIDGE_PORTS as libc::c_ulong, 0];
        let mut request = request(bridge)?;
        request.ifr_ifru.ifru_data = arguments.as_mut_ptr().cast();
        // The kernel reads the four arguments and writes at most as many indices as the third one says.
        call(&self.0, SIOCDEVPRIVATE, &mut request)?;
        Ok(ports.contains(&index))
    }

    /// Its MTU.
    pub fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_mtu = mtu.into();
        call(&self.0, libc::SIOCSIFMTU as libc::c_ulong, &mut request)
    }

    /// The host's own address at it.
    pub fn set_address(&self, name: &str, mac: Mac) -> io::Result<()> {
        let mut request = request(name)?;
        // SAFETY: `sockaddr` is plain data; all zeroes is one.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac.0) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        call(&self.0, libc::SIOCSIFHWADDR as libc::c_ulong, &mut request)
    }
}
