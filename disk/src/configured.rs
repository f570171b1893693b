//! How a disk that is written in configuration ([`DiskSpec`]) is opened: the same for the VMM, and for the replicator that keeps the standby's copy of it.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use understudy_protocol::disk::{DiskAio, DiskCache, DiskFormat, DiskSpec};
use understudy_protocol::iscsi;

use crate::block::{self, Aio, Block, Cache, Format, Iscsi, Tuning};
use crate::error::{Doing, Error, Result};
use crate::store::{Directory, LocalDirectory};

/// Open its base. It is opened for reading until [`Block::take_charge`]; a read-only disk for good. `node` is who an iSCSI target sees.
///
/// # Errors
/// A sentence: it is missing, of another format, a directory, or a block device without a place for slices; the target refuses.
pub fn open_base(spec: &DiskSpec, node: &str) -> Result<Arc<dyn Block>> {
    if let Ok(url) = spec.file.parse::<iscsi::Url>() {
        let chap = spec.chap.as_ref().map(|file| block::read_chap(Path::new(file))).transpose()?;
        return Ok(Arc::new(Iscsi::open(&url, node, chap, spec.read_only, Default::default())?));
    }
    check_file(spec, &std::fs::metadata(&spec.file).doing(|| format!("opening {}", spec.file))?)?;
    block::open_with(Path::new(&spec.file), format(spec), spec.read_only, tuning(spec))
}

/// Open the directory of its slices; make it, if it is not there.
///
/// # Errors
/// A sentence.
pub fn open_slices(spec: &DiskSpec) -> Result<Arc<dyn Directory>> {
    let path = slices(spec);
    let directory = LocalDirectory::make(&path).doing(|| format!("cannot use {} for slices", path.display()))?;
    Ok(Arc::new(directory))
}

/// Where its slices are: where it says, or beside its file.
pub fn slices(spec: &DiskSpec) -> PathBuf {
    spec.slices.as_ref().map_or_else(|| LocalDirectory::beside(Path::new(&spec.file)), PathBuf::from)
}

/// Whether this can be the file of such a disk.
///
/// # Errors
/// A sentence.
pub fn check_file(spec: &DiskSpec, file: &Metadata) -> Result<()> {
    if file.is_dir() {
        return Err(Error::Refused(format!("{} is a directory", spec.file)));
    }
    if spec.read_only || spec.slices.is_some() || file.is_file() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{} is a block device, so say where its slices are (slices=/directory, on a file system that every node sees)",
        spec.file
    )))
}

/// Its format.
pub fn format(spec: &DiskSpec) -> Format {
    match spec.format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
    }
}

fn tuning(spec: &DiskSpec) -> Tuning {
    let cache = match spec.cache {
        None => Cache::Auto,
        Some(DiskCache::None) => Cache::None,
        Some(DiskCache::Writeback) => Cache::Writeback,
    };
    let aio = match spec.aio {
        DiskAio::Auto => Aio::Auto,
        DiskAio::IoUring => Aio::IoUring,
        DiskAio::Threads => Aio::Threads,
    };
    Tuning { cache, aio }
}
