//! Files as memory: the one module of this crate with unsafe code.
//!
//! Two files are worth it, because every replicated byte goes through them: the VMM's arena, which is read, and the stage, which
//! is written. Both are in a tmpfs. RAM is not mapped: it belongs to the VMM, which may do with its length what it likes.
//!
//! A mapped page that its file no longer has ends the process by SIGBUS. Therefore only room that the file
//! has is touched (for writing: that was allocated before), and nobody shortens these files while they are mapped: the arena's owner
//! keeps its length for its life, and a replicator that such a rare hand kills is started again and finds the image whole.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapMut, MmapOptions};

/// A file that another process writes, mapped for reading.
#[derive(Debug)]
pub struct ReadMap(Mmap);

impl ReadMap {
    /// Map all of `file`.
    pub fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private to this struct and read-only. The file's writer, the VMM, changes it only when it is asked to
        // (a cut, its continuation, a harvest), and whoever borrows the bytes is the one who asks: no request is made
        // while a borrow lives. What the bytes say is checked like any input.
        unsafe { Mmap::map(file) }.map(Self)
    }

    /// The file's bytes. Do not hold them across a request to the writer.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A part of a file of this process's own, mapped for reading and writing.
#[derive(Debug)]
pub struct WriteMap(MmapMut);

impl WriteMap {
    /// Map `len` bytes from `offset` (a multiple of the page size) of `file`. It may have less: only what it has room for may be
    /// touched, then or later.
    pub fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: the file lies in the image directory, which only the replicator that holds the machine's lock opens; no two
        // maps of the stage overlap, and no other process or thread looks at it while it is mapped.
        unsafe { MmapOptions::new().offset(offset).len(len).map_mut(file) }.map(Self)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
