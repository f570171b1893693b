//! A small XML tree: enough for a CIB, which has elements, attributes and hardly any text.

use std::fmt;

use quick_xml::Reader;
use quick_xml::Writer;
use quick_xml::escape::resolve_xml_entity;
use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};

/// Deepest nesting that is read; a CIB has about ten levels.
const MAX_DEPTH: usize = 64;

/// One element with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// Tag.
    pub name: String,
    /// Attributes in the order in which they stand.
    pub attributes: Vec<(String, String)>,
    /// Elements inside.
    pub children: Vec<Element>,
    /// Text inside, without surrounding white space (obj_ref and ACL leaves aside, a CIB has none).
    pub text: String,
}

/// Why a text is not XML that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XmlError(pub String);

impl fmt::Display for XmlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for XmlError {}

impl Element {
    /// An empty element.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// With one more attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.attributes.push((name.into(), value.to_string()));
        self
    }

    /// With one more element inside.
    #[must_use]
    pub fn and(mut self, child: Element) -> Self {
        self.children.push(child);
        self
    }

    /// An attribute's value.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Set or replace an attribute.
    pub fn set(&mut self, name: &str, value: &str) {
        match self.attributes.iter_mut().find(|(n, _)| n == name) {
            Some((_, v)) => *v = value.into(),
            None => self.attributes.push((name.into(), value.into())),
        }
    }

    /// The `id` attribute; empty if there is none.
    pub fn id(&self) -> &str {
        self.attribute("id").unwrap_or_default()
    }

    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|c| c.name == name)
    }

    /// The first child of that name, made if there is none.
    pub fn child_or_new(&mut self, name: &str) -> &mut Element {
        let at = match self.children.iter().position(|c| c.name == name) {
            Some(at) => at,
            None => {
                self.children.push(Element::new(name));
                self.children.len() - 1
            }
        };
        &mut self.children[at]
    }

    /// Read a document; declarations and comments are skipped.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        let bad = |e: &dyn fmt::Display| XmlError(format!("unreadable XML: {e}"));
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Element> = Vec::new();
        loop {
            let event = reader.read_event().map_err(|e| bad(&e))?;
            let closed = match &event {
                Event::Start(start) => {
                    if open.len() >= MAX_DEPTH {
                        return Err(XmlError(format!("XML nested deeper than {MAX_DEPTH} levels")));
                    }
                    open.push(element(start)?);
                    None
                }
                Event::Empty(start) => Some(element(start)?),
                Event::End(_) => open.pop(),
                Event::Text(text) => {
                    add_text(&mut open, &text.decode().map_err(|e| bad(&e))?);
                    None
                }
                Event::CData(data) => {
                    add_text(&mut open, &data.decode().map_err(|e| bad(&e))?);
                    None
                }
                // `&lt;` and its like come apart from the text around them.
                Event::GeneralRef(reference) => {
                    let name = reference.decode().map_err(|e| bad(&e))?;
                    match reference.resolve_char_ref().map_err(|e| bad(&e))? {
                        Some(character) => add_text(&mut open, character.encode_utf8(&mut [0; 4])),
                        None => match resolve_xml_entity(&name) {
                            Some(text) => add_text(&mut open, text),
                            None => return Err(XmlError(format!("unreadable XML: &{name}; is not known"))),
                        },
                    }
                    None
                }
                Event::Eof => return Err(XmlError("the XML ends before its root element does".into())),
                _ => None,
            };
            if let Some(mut closed) = closed {
                // Blanks at the ends are indentation.
                closed.text = closed.text.trim().to_owned();
                match open.last_mut() {
                    Some(parent) => parent.children.push(closed),
                    None => return Ok(closed),
                }
            }
        }
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let attributes = self.attributes.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let start = BytesStart::new(self.name.as_str()).with_attributes(attributes);
        if self.children.is_empty() && self.text.is_empty() {
            return writer.write_event(Event::Empty(start));
        }
        writer.write_event(Event::Start(start))?;
        if !self.text.is_empty() {
            writer.write_event(Event::Text(BytesText::new(&self.text)))?;
        }
        for child in &self.children {
            child.write(writer)?;
        }
        writer.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }
}

fn add_text(open: &mut [Element], text: &str) {
    if let Some(parent) = open.last_mut() {
        parent.text.push_str(text);
    }
}

fn element(start: &BytesStart) -> Result<Element, XmlError> {
    let mut element = Element::new(&String::from_utf8_lossy(start.name().as_ref()));
    if element.name.is_empty() {
        return Err(XmlError("unreadable XML: an element without a name".into()));
    }
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|e| XmlError(format!("unreadable XML: {e}")))?;
        let value = attribute.unescape_value().map_err(|e| XmlError(format!("unreadable XML: {e}")))?;
        element.attributes.push((String::from_utf8_lossy(attribute.key.as_ref()).into_owned(), value.into_owned()));
    }
    Ok(element)
}

/// As XML, indented by two blanks a level.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        self.write(&mut writer).map_err(|_| fmt::Error)?;
        f.write_str(&String::from_utf8_lossy(&writer.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        let element = Element::new("a")
            .with("x", "1 < 2 & \"three\"'")
            .and(Element::new("b"))
            .and(Element::new("c").with("y", ""));
        assert_eq!(Element::parse(&element.to_string()).unwrap(), element);
    }

    #[test]
    fn text_keeps_what_is_escaped_in_it() {
        let element = Element::parse("<a>\n  1 &lt; 2 &amp; <![CDATA[3 < 4]]> &#x41;\n  <b/></a>").unwrap();
        assert_eq!(element.text, "1 < 2 & 3 < 4 A");
        assert_eq!(Element::parse(&element.to_string()).unwrap(), element);
        assert!(Element::parse("<a>&unknown;</a>").is_err());
    }

    #[test]
    fn a_document_that_ends_early_is_an_error() {
        for text in ["", "< a=''/>", "<a>", "<a><b></a>", "<?xml version=\"1.0\"?>", "text"] {
            assert!(Element::parse(text).is_err(), "{text}");
        }
        assert!(Element::parse(&"<a>".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            let _ = Element::parse(&text);
        }
    }
}
