//! Questions in a real CIB, by the lab root's own cibadmin. Without root and a lab root the test says SKIPPED and passes.

use std::path::{Path, PathBuf};

use understudy_alerts::approval::{Answer, Given, Record, Request, Way, code, digest};
use understudy_alerts::cluster::{Cib, Records};
use understudy_alerts::{answering, settings};
use understudy_protocol::key::Key;

const EMPTY: &str = "<cib crm_feature_set=\"3.16.1\" validate-with=\"pacemaker-3.9\" epoch=\"1\" num_updates=\"0\" admin_epoch=\"0\">\
    <configuration><crm_config/><nodes/><resources/><constraints/></configuration><status/></cib>";
/// Enters the lab root with a directory of the test's at /mnt.
const ENTER: &str =
    "mount --bind \"$2\" \"$1/mnt\"; root=$1; shift 2; CIB_file=/mnt/cib.xml exec chroot \"$root\" \"$@\"";

fn cib(dir: &Path) -> Option<Cib> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
    let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
    if !nix::unistd::geteuid().is_root() || !root.join("usr/sbin/cibadmin").exists() {
        eprintln!("SKIPPED: needs root and a lab root with Pacemaker at {}", root.display());
        return None;
    }
    std::fs::write(dir.join("cib.xml"), EMPTY).unwrap();
    let words = [
        "env",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        ENTER,
        "enter",
    ];
    let mut words: Vec<String> = words.map(str::to_owned).into();
    words.extend([root.canonicalize().unwrap(), dir.to_owned()].map(|path| path.display().to_string()));
    Some(Cib::through(words))
}

fn request(id: &str) -> Request {
    let summary = "web1 \"to\" n2 & <n3>\n\tl'autre ü".to_owned();
    Request {
        id: id.into(),
        plan: digest(&summary),
        summary,
        asked: 1000,
        expires: 2000,
        approvers: vec!["night".into()],
    }
}

#[test]
fn a_question_is_stored_changed_only_from_its_revision_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let Some(cib) = cib(dir.path()) else { return };
    assert_eq!(cib.all().unwrap(), []);
    assert_eq!(cib.settings().unwrap(), settings::Settings::default());
    let first = Record::ask(request("n1-17")).unwrap();
    let other = Record::ask(request("n1-1")).unwrap();
    assert!(cib.put(&first, None).unwrap() && cib.put(&other, None).unwrap());
    // What is there is not put there again.
    assert!(!cib.put(&first, None).unwrap());
    assert_eq!(cib.get("n1-17").unwrap().unwrap(), first);

    let second = first.after_telling();
    assert!(cib.put(&second, Some(first.revision)).unwrap());
    // Whoever has read what was there before comes too late.
    assert!(!cib.put(&first.after_telling(), Some(first.revision)).unwrap());
    assert_eq!(cib.all().unwrap().len(), 2);

    let key = Key::from_bytes([9; 32], "test");
    let typed = code(&key, &second.request, "night").to_string();
    let given = Given { answer: Answer::Approve, code: &typed, name: Some("root"), way: Way::Cli };
    let decision = answering::answer(&cib, &key, "n1-17", &given, 1500, &|_| {}).unwrap();
    let stored = cib.get("n1-17").unwrap().unwrap();
    assert_eq!((stored.decision.as_ref(), stored.revision), (Some(&decision), 3));
    assert!(answering::answer(&cib, &key, "n1-17", &given, 1500, &|_| {}).is_err());

    cib.remove(&stored).unwrap();
    assert_eq!(cib.get("n1-17").unwrap(), None);
    assert_eq!(cib.get("n1-1").unwrap(), Some(other));
}
