//! One packet on its way between a guest and the outside, with the offload fields that virtio-net and the tap share.

/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2 §5.1.6), as the device's rings and a tap with `TUNSETVNETHDRSZ` 12 carry them.
pub const HEADER: usize = 12;

/// One packet: an Ethernet frame, perhaps larger than the MTU (segmentation offload) and with a checksum that is still to be made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Packet {
    /// `struct virtio_net_hdr_v1`, little endian, as the tap takes it.
    pub header: [u8; HEADER],
    /// The frame, from the destination address on, without the check sequence.
    pub frame: Vec<u8>,
    /// The queue pair that it came by.
    pub queue: u16,
}

impl Packet {
    /// What it takes of a bound.
    pub fn bytes(&self) -> usize {
        HEADER + self.frame.len()
    }
}
