//! Alerts and approval in a policy: what `check` says, what becomes of them, and what Pacemaker says of that.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use understudy_alerts::cluster::settings;
use understudy_alerts::settings::{Kind, Tls};
use understudy_crm::check::{self, Severity};
use understudy_crm::compile::compile;
use understudy_crm::merge::{Change, merge};
use understudy_crm::policy::Policy;
use understudy_crm::xml::Element;
use understudy_crm::{cib, crm, pcs};

const EXAMPLE: &str = include_str!("../../docs/policy-example.toml");
const LEAST: &str = "[[nodes]]\nname = \"n1\"\nstorage = \"10.0.0.1\"\n[[fencing]]\nname = \"f\"\nagent = \"fence_x\"\nnodes = [\"n1\"]\n";

fn policy(text: &str) -> Policy {
    let (policy, findings) = check::read(text);
    policy.unwrap_or_else(|| panic!("{findings:#?}"))
}

#[track_caller]
fn says(more: &str, severity: Severity, words: &str) {
    let findings = check::read(&format!("{LEAST}{more}")).1;
    let found = findings.iter().any(|f| f.severity == severity && f.what.contains(words));
    assert!(found, "nothing with {words:?} among {findings:#?}");
}

const MAIL: &str = "[[alerts]]\nname = \"night\"\nkind = \"mail\"\nto = \"a@b.example\"\n";

#[test]
fn what_cannot_reach_anybody_is_said() {
    says(&format!("{MAIL}{MAIL}"), Severity::Error, "two alerts named night");
    says(MAIL, Severity::Note, "localhost, port 25");
    says("[[alerts]]\nname = \"a\"\nkind = \"sms\"\nto = \"+491234\"\n", Severity::Error, "no way to telephones");
    says("[sms]\ncommand = \"/x\"\nurl = \"https://y\"\n", Severity::Error, "say one of them");
    says("[sms]\nurl = \"ftp://y\"\n", Severity::Error, "is not a URL");
    says("[mail]\nserver = \"m\"\nuser = \"u\"\n", Severity::Error, "a user without a password");
    says("[mail]\nserver = \"m\"\nuser = \"u\"\npassword_file = \"p\"\n", Severity::Error, "absolute path");
    says(
        "[mail]\nserver = \"m\"\nuser = \"u\"\npassword_file = \"/p\"\ntls = \"none\"\n",
        Severity::Error,
        "in the clear",
    );
    says("[mail]\nserver = \"m\"\nfrom = \"nobody\"\n", Severity::Error, "is not a mail address");
    says("[approval]\nexpires = 0\n", Severity::Error, "nobody could answer");
    says(&format!("{MAIL}[approval]\n"), Severity::Warning, "no [[alerts]] has approves = true");
}

#[test]
fn nothing_of_alerts_in_the_example_is_left_undone() {
    let findings = check::read(EXAMPLE).1;
    assert!(!findings.iter().any(|f| f.what.contains("alerts") || f.what.contains("[approval]")), "{findings:#?}");
}

#[test]
fn what_is_written_is_what_the_agent_and_the_controller_read() {
    let document = cib::document(&policy(EXAMPLE), &compile(&policy(EXAMPLE)));
    let alerts = document.child("configuration").unwrap().child("alerts").unwrap();
    let read = settings(&alerts.to_string()).unwrap();
    let recipient = &read.recipients[0];
    assert_eq!((recipient.name.as_str(), recipient.kind, recipient.approves), ("night-shift", Kind::Mail, true));
    assert_eq!((recipient.to.as_str(), recipient.window), ("night@works.example", 300));
    assert_eq!((read.delivery.mail.server.as_str(), read.delivery.mail.tls), ("mail.works.example", Tls::Starttls));
    assert_eq!(read.approval.expires, 900);
}

#[test]
fn a_policy_without_alerts_has_none_and_leaves_others_alone() {
    let none = compile(&policy(LEAST));
    assert_eq!(none.alerts, None);
    let document = cib::document(&policy(LEAST), &none);
    assert!(document.child("configuration").unwrap().child("alerts").is_none());

    let others = "<cib><configuration><crm_config/><nodes/><resources/><constraints/><alerts><alert id=\"mine\" path=\"/x\"/></alerts>\
        </configuration></cib>";
    let (with, changes) = merge(&Element::parse(others).unwrap(), &compile(&policy(EXAMPLE)));
    let alerts = |cib: &Element| {
        let alerts = cib.child("configuration").unwrap().child("alerts").unwrap();
        alerts.children.iter().map(|alert| alert.id().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(alerts(&with), ["mine", "understudy-alert"]);
    assert!(changes.iter().any(|c| matches!(c, Change::Add(e) if e.id() == "understudy-alert")));
    assert!(merge(&with, &compile(&policy(EXAMPLE))).1.is_empty(), "applied twice is applied once");
    let (without, changes) = merge(&with, &none);
    assert_eq!(alerts(&without), ["mine"]);
    assert!(changes.iter().any(|c| matches!(c, Change::Remove(e) if e.id() == "understudy-alert")));
}

/// The lab root's tools.
fn tool(root: &Path, words: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new("chroot");
    command.arg(root).args(words).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn pacemaker_pcs_and_crm_accept_all_kinds_of_recipients() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
    let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
    if std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) != 0)
        || !root.join("usr/sbin/crm_verify").exists()
    {
        eprintln!("SKIPPED: needs root and a lab root with Pacemaker at {}", root.display());
        return;
    }
    let more = "[[alerts]]\nname = \"duty\"\nkind = \"sms\"\nto = \"+4930123456\"\nseverity = \"critical\"\nwindow = 0\n\
        [[alerts]]\nname = \"board\"\nkind = \"webhook\"\nto = \"https://hooks.works.example/a?b=c&d=e\"\n\
        [[alerts]]\nname = \"script\"\nkind = \"command\"\nto = \"/usr/local/bin/tell\"\n\
        [sms]\ncommand = \"/usr/local/bin/send sms\"\n[hooks]\ntoken_file = \"/etc/understudy/token\"\n";
    let policy = policy(&format!("{EXAMPLE}{more}"));
    let configuration = compile(&policy);
    let (good, said) =
        tool(&root, &["crm_verify", "-V", "--xml-pipe"], &cib::document(&policy, &configuration).to_string());
    assert!(good && said.trim().is_empty(), "{said}");

    // The same from pcs and from crm, into an empty configuration.
    let empty = "<cib crm_feature_set=\"3.16.1\" validate-with=\"pacemaker-3.9\" epoch=\"1\" num_updates=\"0\" admin_epoch=\"0\">\
        <configuration><crm_config/><nodes/><resources/><constraints/></configuration><status/></cib>";
    let only = |text: &str, begins: &str| -> String {
        let mut lines = text.lines().skip_while(|line| !line.starts_with(begins));
        let mut kept = String::new();
        for line in lines.by_ref() {
            if !line.starts_with(begins) && !line.starts_with(' ') {
                break;
            }
            kept.push_str(line);
            kept.push('\n');
        }
        assert!(!kept.is_empty());
        kept
    };
    let script = only(&pcs::script(&configuration), "pcs alert").replace("pcs alert", "pcs -f $f alert");
    let script = format!("set -e; f=$(mktemp); trap 'rm -f $f' EXIT; cat > $f <<'E'\n{empty}\nE\n{script}\ncat $f");
    let (good, said) = tool(&root, &["sh", "-c", &script], "");
    assert!(good, "{said}");
    let from_pcs = settings(&said[said.find("<cib").unwrap()..]).unwrap();
    let ours = settings(
        &cib::document(&policy, &configuration).child("configuration").unwrap().child("alerts").unwrap().to_string(),
    );
    assert_eq!(from_pcs, ours.unwrap());
    let statement = only(&crm::text(&configuration), "alert ");
    let script = format!(
        "set -e; f=$(mktemp); trap 'rm -f $f $f.crm' EXIT; cat > $f <<'E'\n{empty}\nE\ncat > $f.crm <<'E'\n{statement}E\n\
         CIB_file=$f crm -F configure load update $f.crm; cat $f"
    );
    let (good, said) = tool(&root, &["sh", "-c", &script], "");
    assert!(good, "{said}");
    assert_eq!(settings(&said[said.find("<cib").unwrap()..]).unwrap(), from_pcs);
}
